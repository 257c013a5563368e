//! Smaller models from a bigger one: keeps some of its layers, as DistilBERT and DistilBART do (Shleifer and Rush, arXiv
//! 2010.13002).

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Result, bail};
use serde_json::Value;

use super::network::LayerStack;
use super::t5;
use super::weights::Tensors;
use crate::config::{LayerChoice, StudentConfig};
use crate::exit::Exit;
use crate::model::config::shape::{Architecture, ModelConfig};

/// The layers that a model was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptLayers {
    /// Indices of the kept layers of each stack, in the order of [`ModelConfig::layer_stacks`], and the number of its
    /// layers before.
    stacks: Vec<(Vec<usize>, usize)>,
}

impl fmt::Display for KeptLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: &[&str] = match self.stacks.len() {
            1 => &[""],
            _ => &["encoder ", "decoder "],
        };
        for (index, ((kept, all), name)) in self.stacks.iter().zip(names).enumerate() {
            let separator = if index > 0 { "; " } else { "" };
            let kept: Vec<String> = kept.iter().map(usize::to_string).collect();
            write!(f, "{separator}{name}layers {} of {all}", kept.join(", "))?;
        }
        Ok(())
    }
}

/// Keeps the layers that `settings` name. Returns the smaller model and its layers.
///
/// # Errors
/// [`Exit::Usage`] if the settings name no layers, or layers that do not exist.
pub fn keep_layers(
    config: &ModelConfig,
    tensors: Tensors,
    settings: &StudentConfig,
) -> Result<(ModelConfig, Tensors, KeptLayers)> {
    let stacks = config.layer_stacks();
    if settings.encoder_layers.is_some() && !config.is_encoder_decoder() {
        bail!(Exit::Usage(format!(
            "`student.encoder_layers` is set, and a {} model has no encoder: set `student.decoder_layers` alone",
            config.model_type()
        )));
    }
    if settings.encoder_layers.is_none() && settings.decoder_layers.is_none() {
        bail!(Exit::Usage(
            "`student.init` = \"layers\" keeps some layers of the model: set `student.decoder_layers` \
             (and `student.encoder_layers`) to their number or their indices, as in [0, 2, 5]"
                .into()
        ));
    }
    let choices: &[(&str, &Option<LayerChoice>)] = &[
        ("student.encoder_layers", &settings.encoder_layers),
        ("student.decoder_layers", &settings.decoder_layers),
    ];
    let choices = &choices[choices.len() - stacks.len()..];
    let mut kept_stacks = Vec::new();
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    let mut json = config.json.clone();
    for (
        &LayerStack {
            prefix,
            layers,
            field,
        },
        (key, choice),
    ) in stacks.iter().zip(choices)
    {
        let kept = match choice {
            Some(choice) => indices(choice, layers, key)?,
            None => (0..layers).collect(),
        };
        json.insert(field.into(), kept.len().into());
        for (new_index, index) in kept.iter().enumerate() {
            let (old, new) = (format!("{prefix}{index}."), format!("{prefix}{new_index}."));
            let of_layer = tensors.keys().filter(|name| name.starts_with(&old));
            names.extend(of_layer.map(|name| (name.replacen(&old, &new, 1), name.clone())));
        }
        kept_stacks.push((kept, layers));
    }
    let is_outside = |name: &&String| !stacks.iter().any(|stack| name.starts_with(stack.prefix));
    names.extend(
        tensors
            .keys()
            .filter(is_outside)
            .map(|name| (name.clone(), name.clone())),
    );
    if let Architecture::Llama(variant) = &config.architecture {
        // The window of a layer may depend on its index.
        let has_window = variant.windows.iter().any(Option::is_some);
        if json.contains_key("layer_types") || has_window && config.model_type() != "mistral" {
            let layer_type = |index: &usize| match variant.windows[*index] {
                Some(_) => Value::from("sliding_attention"),
                None => Value::from("full_attention"),
            };
            let types = kept_stacks[0].0.iter().map(layer_type).collect();
            json.insert("layer_types".into(), types);
        }
    }
    if config.is_encoder_decoder() {
        // The first layer of each stack holds the bias of all its layers.
        for stack in &stacks {
            let name = t5::position_bias_name(stack.prefix);
            names.insert(name.clone(), name);
        }
    }
    let tensor = |(new, old): (String, String)| Some((new, tensors.get(&old)?.clone()));
    let kept_tensors = names.into_iter().filter_map(tensor).collect();
    let kept_config = ModelConfig::from_json(json)?;
    Ok((
        kept_config,
        kept_tensors,
        KeptLayers {
            stacks: kept_stacks,
        },
    ))
}

/// Returns the layers of `choice` out of `layers`. `key` is the name of the setting.
fn indices(choice: &LayerChoice, layers: usize, key: &str) -> Result<Vec<usize>> {
    let kept = match choice {
        LayerChoice::Count(count) if (1..=layers).contains(count) => {
            return Ok(spread(*count, layers));
        }
        LayerChoice::Count(count) => bail!(Exit::Usage(format!(
            "`{key}` = {count}, and the model has {layers} layers: set it to 1 to {layers}"
        ))),
        LayerChoice::Indices(kept) => kept,
    };
    if let Some(index) = kept.iter().find(|index| **index >= layers) {
        bail!(Exit::Usage(format!(
            "`{key}` names layer {index}, which does not exist: the model has the layers 0 to {}",
            layers - 1
        )));
    }
    if kept.is_empty() || !kept.is_sorted_by(|a, b| a < b) {
        bail!(Exit::Usage(format!(
            "`{key}` must list at least one layer, in ascending order and each once"
        )));
    }
    Ok(kept.clone())
}

/// Chooses `count` of `layers` layers: by the tables of DistilBART, or else at equal distances, with the first and the
/// last.
fn spread(count: usize, layers: usize) -> Vec<usize> {
    match (layers, count) {
        (12, 2) => vec![0, 6],
        (12, 4) => vec![0, 4, 8, 11],
        (12, 9) => vec![0, 1, 2, 4, 5, 7, 9, 10, 11],
        (6, 3) => vec![0, 2, 5],
        (6, 4) => vec![0, 1, 3, 5],
        (_, 1) => vec![0],
        // Rounded to the nearest index, halves up, which equals the other tables.
        _ => (0..count)
            .map(|index| (2 * index * (layers - 1) + count - 1) / (2 * (count - 1)))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tables of DistilBART (`make_student.py` in transformers' examples).
    #[test]
    fn counts_select_the_layers_of_distilbart() {
        let tables: [(usize, &[&[usize]]); 2] = [
            (
                12,
                &[
                    &[0],
                    &[0, 6],
                    &[0, 6, 11],
                    &[0, 4, 8, 11],
                    &[0, 2, 4, 7, 9, 11],
                    &[0, 1, 2, 4, 5, 7, 9, 10, 11],
                ],
            ),
            (6, &[&[0], &[0, 5], &[0, 2, 5], &[0, 1, 3, 5]]),
        ];
        for (layers, rows) in tables {
            for row in rows {
                assert_eq!(spread(row.len(), layers), *row);
            }
            assert_eq!(spread(layers, layers), (0..layers).collect::<Vec<_>>());
        }
        assert_eq!(spread(4, 30), [0, 10, 19, 29]);
        assert_eq!(spread(3, 8), [0, 4, 7]);
    }

    #[test]
    fn layers_that_do_not_exist_are_refused() {
        let error = |choice| {
            indices(&choice, 6, "student.decoder_layers")
                .unwrap_err()
                .to_string()
        };
        for (choice, expected) in [
            (
                LayerChoice::Indices(vec![0, 6]),
                "layer 6, which does not exist: the model has the layers 0 to 5",
            ),
            (LayerChoice::Indices(vec![]), "at least one layer"),
            (LayerChoice::Indices(vec![2, 2]), "each once"),
            (LayerChoice::Indices(vec![3, 1]), "ascending"),
            (LayerChoice::Count(0), "set it to 1 to 6"),
            (LayerChoice::Count(7), "set it to 1 to 6"),
        ] {
            assert!(error(choice).contains(expected), "{expected}");
        }
    }
}
