//! The llama decoder, compared with candle-transformers. Compiled only with the feature `candle-transformers`.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama as reference;
use distill::model::Model;

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
