//! The llama decoder and T5, compared with candle-transformers. Compiled only with the feature `candle-transformers`.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama as reference, t5};
use distill::model::config::shape::ModelConfig;
use distill::model::weights::{self, Tensors};
use distill::model::{Model, ModelInput, SourceInput};
use serde_json::Value;

use crate::model::{all_logits, assert_close, tiny};

#[test]
fn llama_logits_agree_with_candle_transformers() {
    for tied in [true, false] {
        let (config, tensors) = tiny(tied);
        let model = Model::new(config.clone(), &tensors).unwrap();
        let ids: Vec<u32> = (0..100).map(|i| (i * 17 + 5) % 61).collect();
        let config = reference::Config {
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            vocab_size: config.vocab_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.heads.query,
            num_key_value_heads: config.heads.key_value,
            use_flash_attn: false,
            rms_norm_eps: config.norm_eps,
            rope_theta: config.rope().unwrap().theta as f32,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling: None,
            max_position_embeddings: config.max_position_embeddings,
            tie_word_embeddings: tied,
        };
        let builder =
            VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
        let expected = reference::Llama::load(builder, &config).unwrap();
        let mut cache = reference::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
        let input = Tensor::new(ids.as_slice(), &Device::Cpu).unwrap();
        let input = input.unsqueeze(0).unwrap();
        let last = expected.forward(&input, 0, &mut cache).unwrap();
        let last: Vec<f32> = last.flatten_all().unwrap().to_vec1().unwrap();
        let ours = all_logits(&model, &ids);
        assert_close(&ours[99], &last, 1e-4);
    }
}

/// candle-transformers 0.11 uses the buckets of the encoder in the decoder too, which are right only for short distances,
/// and multiplies the hidden states before a tied head by sqrt(D) instead of dividing them. `distance` is the number of
/// positions with equal buckets.
#[test]
fn t5_logits_agree_with_candle_transformers() {
    for (name, distance) in [("t5", 8), ("t5_v1_1", 2)] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden/t5");
        let text = std::fs::read_to_string(folder.join(format!("{name}.json"))).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        let tensors = weights::load_file(&folder.join(format!("{name}.safetensors"))).unwrap();
        let weight = |(name, tensor): (&String, &Tensor)| {
            Some((name.strip_prefix("weight.")?.to_owned(), tensor.clone()))
        };
        let tensors: Tensors = tensors.iter().filter_map(weight).collect();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), json["config"].to_string()).unwrap();
        let config = ModelConfig::load(dir.path()).unwrap();
        let scale = if config.tie_word_embeddings {
            config.hidden_size as f64
        } else {
            1.0
        };
        let model = Model::new(config, &tensors).unwrap();
        let builder =
            VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
        let mut settings = json["config"].clone();
        settings["use_cache"] = false.into();
        let settings: t5::Config = serde_json::from_value(settings).unwrap();
        for sequence in json["sequences"].as_array().unwrap() {
            let ids = |field: &str| -> Vec<u32> {
                serde_json::from_value(sequence[field].clone()).unwrap()
            };
            let (source, decoder) = (ids("source"), ids("ids"));
            let decoder = &decoder[..distance.min(decoder.len() - 1)];
            let tensor = |ids: &[u32]| {
                Tensor::new(ids, &Device::Cpu)
                    .unwrap()
                    .unsqueeze(0)
                    .unwrap()
            };
            let mut reference =
                t5::T5ForConditionalGeneration::load(builder.clone(), &settings).unwrap();
            let expected = reference
                .forward(&tensor(&source), &tensor(decoder))
                .unwrap();
            let expected = (expected / scale).unwrap();
            let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
            let (decoder_segment, source_segment) = (0..decoder.len(), 0..source.len());
            let input = ModelInput {
                input_ids_T: decoder,
                segments_B: std::slice::from_ref(&decoder_segment),
                positions_N: &[decoder.len() as u32 - 1],
                source: SourceInput {
                    ids_U: &source,
                    segments_B: std::slice::from_ref(&source_segment),
                },
            };
            let ours = model.map_logits(input, |_, row| row.to_vec()).unwrap();
            assert_close(&ours[0], &expected, 1e-4);
        }
    }
}
