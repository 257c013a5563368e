//! Where a training runs, and in which number type.

use anyhow::{Result, bail};
use candle_core::Device;

use crate::config::{self, ComputeDtype, Train};
use crate::exit::Exit;
use crate::ops::matmul::Precision;

/// The device that `train.device` names.
///
/// # Errors
/// [`Exit::Usage`] where this program, or this machine, has no such device, or the device cannot do
/// what the settings ask for.
pub fn of(train: &Train) -> Result<Device> {
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
        // Its other lines are a backtrace, where one is asked for.
        let error = error.to_string();
        Exit::Usage(format!(
            "train.device = \"{name}\" does not answer: {}; is there a GPU with its driver? \
             train.device = \"cpu\" trains without",
            error.lines().next().unwrap_or_default()
        ))
        .into()
    })
}

fn open(kind: config::Device) -> candle_core::Result<Device> {
    match kind {
        config::Device::Metal => Device::new_metal(0),
        _ => Device::new_cuda(0),
    }
}

/// The settings with the device and the number type that "auto" stands for.
pub fn resolved(train: &Train) -> Train {
    let device = kind(train);
    let dtype = match (train.dtype, device) {
        (ComputeDtype::Auto, config::Device::Cuda) => ComputeDtype::Bf16,
        (ComputeDtype::Auto, config::Device::Cpu) if Precision::fastest() == Precision::Bf16 => {
            ComputeDtype::Bf16
        }
        (ComputeDtype::Auto, _) => ComputeDtype::F32,
        (given, _) => given,
    };
    Train {
        device,
        dtype,
        ..train.clone()
    }
}

/// A GPU that this program was built for, where there is one.
fn kind(train: &Train) -> config::Device {
    use config::Device::{Auto, Cpu, Cuda, Metal};
    match train.device {
        Auto if cfg!(feature = "cuda") && open(Cuda).is_ok() => Cuda,
        Auto if cfg!(feature = "metal") && open(Metal).is_ok() => Metal,
        Auto => Cpu,
        given => given,
    }
}

/// The number type of [`resolved`] settings.
pub fn precision(train: &Train) -> Precision {
    match train.dtype {
        ComputeDtype::Bf16 => Precision::Bf16,
        ComputeDtype::F32 | ComputeDtype::Auto => Precision::F32,
    }
}

/// What the opening line calls the device.
pub fn name(train: &Train) -> &'static str {
    match train.device {
        config::Device::Cuda => " on CUDA",
        config::Device::Metal => " on Metal",
        config::Device::Cpu | config::Device::Auto => "",
    }
}
