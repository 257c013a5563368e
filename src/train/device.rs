//! Device and dtype of a training run.

use anyhow::{Result, bail};
use candle_core::Device;

use crate::config::{self, ComputeDtype, TrainConfig};
use crate::exit::Exit;
use crate::ops::matmul::Precision;

/// Opens the device of `train.device`.
///
/// # Errors
/// [`Exit::Usage`] if this build or machine lacks the device, or the device does not support the settings.
pub(crate) fn open(train: &TrainConfig) -> Result<Device> {
    let kind = device_kind(train);
    if kind == config::Device::Cpu {
        return Ok(Device::Cpu);
    }
    if train.activation_checkpointing {
        bail!(Exit::Usage(
            "`train.activation_checkpointing` needs the CPU: set `train.device = \"cpu\"`, or remove it \
             and lower `train.micro_batch_size`"
                .into()
        ));
    }
    if train.on_policy {
        bail!(Exit::Usage(
            "`train.on_policy` generates text, which needs the CPU: set `train.device = \"cpu\"`"
                .into()
        ));
    }
    let (is_built, name) = match kind {
        config::Device::Metal => (cfg!(feature = "metal"), "metal"),
        _ => (cfg!(feature = "cuda"), "cuda"),
    };
    if !is_built {
        bail!(Exit::Usage(format!(
            "`train.device = \"{name}\"`, but this program was built without it: run \
             `cargo build --release --features {name}`"
        )));
    }
    open_gpu(kind).map_err(|error| {
        Exit::Usage(format!(
            "cannot open `train.device = \"{name}\"`: {}; check the GPU and its driver, or set \
             `train.device = \"cpu\"`",
            first_line(&error)
        ))
        .into()
    })
}

/// Returns the first line of an error. The other lines may be a backtrace.
fn first_line(error: &candle_core::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}

fn open_gpu(kind: config::Device) -> candle_core::Result<Device> {
    match kind {
        config::Device::Metal => Device::new_metal(0),
        _ => Device::new_cuda(0),
    }
}

/// Returns the settings with "auto" replaced by a device and a dtype.
pub(crate) fn resolved(train: &TrainConfig) -> TrainConfig {
    let device = device_kind(train);
    let dtype = match (train.dtype, device) {
        (ComputeDtype::Auto, config::Device::Cuda) => ComputeDtype::Bf16,
        (ComputeDtype::Auto, config::Device::Cpu) if Precision::fastest() == Precision::Bf16 => {
            ComputeDtype::Bf16
        }
        (ComputeDtype::Auto, _) => ComputeDtype::F32,
        (dtype, _) => dtype,
    };
    TrainConfig {
        device,
        dtype,
        ..train.clone()
    }
}

/// Resolves "auto" to a GPU that this build supports and that opens, else to the CPU.
fn device_kind(train: &TrainConfig) -> config::Device {
    use config::Device::{Auto, Cpu, Cuda, Metal};
    if train.device != Auto {
        return train.device;
    }
    for (is_built, kind) in [
        (cfg!(feature = "cuda"), Cuda),
        (cfg!(feature = "metal"), Metal),
    ] {
        match is_built.then(|| open_gpu(kind)) {
            Some(Ok(_)) => return kind,
            Some(Err(error)) => {
                tracing::warn!("no usable GPU, training on the CPU: {}", first_line(&error))
            }
            None => {}
        }
    }
    Cpu
}

/// Returns the precision of [`resolved`] settings.
pub(crate) fn precision(train: &TrainConfig) -> Precision {
    match train.dtype {
        ComputeDtype::Bf16 => Precision::Bf16,
        ComputeDtype::F32 | ComputeDtype::Auto => Precision::F32,
    }
}

/// Returns the name of the device for the opening line: " on CUDA" or " on Metal", empty for the CPU.
pub(crate) fn label(train: &TrainConfig) -> &'static str {
    match train.device {
        config::Device::Cuda => " on CUDA",
        config::Device::Metal => " on Metal",
        config::Device::Cpu | config::Device::Auto => "",
    }
}
