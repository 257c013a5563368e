//! Where a training runs, and in which number type.

use anyhow::{Result, bail};
use candle_core::Device;

use crate::config::{self, ComputeDtype, TrainConfig};
use crate::exit::Exit;
use crate::ops::matmul::Precision;

/// The device that `train.device` names.
///
/// # Errors
/// [`Exit::Usage`] where this program, or this machine, has no such device, or the device cannot do
/// what the settings ask for.
pub(crate) fn of(train: &TrainConfig) -> Result<Device> {
    let kind = kind(train);
    if kind == config::Device::Cpu {
        return Ok(Device::Cpu);
    }
    if train.activation_checkpointing {
        bail!(Exit::Usage(
            "train.activation_checkpointing is for the CPU: set train.device = \"cpu\", or leave it \
             out and lower train.micro_batch_size"
                .into()
        ));
    }
    if train.on_policy {
        bail!(Exit::Usage(
            "train.on_policy is for the CPU, which generates: set train.device = \"cpu\"".into()
        ));
    }
    let (built, name) = match kind {
        config::Device::Metal => (cfg!(feature = "metal"), "metal"),
        _ => (cfg!(feature = "cuda"), "cuda"),
    };
    if !built {
        bail!(Exit::Usage(format!(
            "train.device is \"{name}\", and this program was built without it: build it with \
             `cargo build --release --features {name}`"
        )));
    }
    open(kind).map_err(|error| {
        Exit::Usage(format!(
            "train.device = \"{name}\" does not answer: {}; is there a GPU with its driver? \
             train.device = \"cpu\" trains without",
            first_line(&error)
        ))
        .into()
    })
}

/// Its other lines are a backtrace, where one is asked for.
fn first_line(error: &candle_core::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}

fn open(kind: config::Device) -> candle_core::Result<Device> {
    match kind {
        config::Device::Metal => Device::new_metal(0),
        _ => Device::new_cuda(0),
    }
}

/// The settings with the device and the number type that "auto" stands for.
pub(crate) fn resolved(train: &TrainConfig) -> TrainConfig {
    let device = kind(train);
    let dtype = match (train.dtype, device) {
        (ComputeDtype::Auto, config::Device::Cuda) => ComputeDtype::Bf16,
        (ComputeDtype::Auto, config::Device::Cpu) if Precision::fastest() == Precision::Bf16 => {
            ComputeDtype::Bf16
        }
        (ComputeDtype::Auto, _) => ComputeDtype::F32,
        (given, _) => given,
    };
    TrainConfig {
        device,
        dtype,
        ..train.clone()
    }
}

/// A GPU that this program was built for, where there is one.
fn kind(train: &TrainConfig) -> config::Device {
    use config::Device::{Auto, Cpu, Cuda, Metal};
    if train.device != Auto {
        return train.device;
    }
    for (built, kind) in [
        (cfg!(feature = "cuda"), Cuda),
        (cfg!(feature = "metal"), Metal),
    ] {
        match built.then(|| open(kind)) {
            Some(Ok(_)) => return kind,
            Some(Err(error)) => tracing::warn!("no GPU, so the CPU: {}", first_line(&error)),
            None => {}
        }
    }
    Cpu
}

/// The number type of [`resolved`] settings.
pub(crate) fn precision(train: &TrainConfig) -> Precision {
    match train.dtype {
        ComputeDtype::Bf16 => Precision::Bf16,
        ComputeDtype::F32 | ComputeDtype::Auto => Precision::F32,
    }
}

/// What the opening line calls the device.
pub(crate) fn name(train: &TrainConfig) -> &'static str {
    match train.device {
        config::Device::Cuda => " on CUDA",
        config::Device::Metal => " on Metal",
        config::Device::Cpu | config::Device::Auto => "",
    }
}
