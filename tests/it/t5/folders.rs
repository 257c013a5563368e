//! Folders as both versions of transformers and older programs write them, and folders that are refused.

use std::fs;

use candle_core::Tensor;
use distill::config::{Config, KdMode, LayerChoice, StudentInit};
use distill::model::layer_selection::keep_layers;
use distill::model::{Model, network};
use distill::tokenizer::Tokenizer;
use distill::train;
use distill::train::summary::StartMode;
use serde_json::{Value, json};

use super::training::run_folder;
use super::{change_json, student, write_json, write_model};
use crate::tiny;

/// A folder whose `config.json` and weights tests change.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), 5);
        Self(dir)
    }

    fn change(&self, change: impl FnOnce(&mut Value)) {
        change_json(&self.0.path().join("config.json"), change);
    }

    fn change_weights(&self, change: impl FnOnce(&mut distill::model::weights::Tensors)) {
        let path = self.0.path().join("model.safetensors");
        let mut tensors = distill::model::weights::load_file(&path).unwrap();
        change(&mut tensors);
        tiny::write_weights(self.0.path(), &tensors);
    }

    /// Returns the first logits of the answer to a source.
    fn logits(&self) -> Vec<f32> {
        let model = Model::load(self.0.path()).unwrap();
        let mut caches = model.encode_sources(&[&[3, 9, 20, 1]]).unwrap();
        model.step(&[&[0]], &mut [&mut caches[0]]).unwrap()
    }

    /// Generates a token with the command. Returns what it prints to stderr.
    fn generate(&self) -> String {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_distill"))
            .args(["generate", "--max-tokens", "1", "--model"])
            .arg(self.0.path())
            .arg("the cat")
            .output()
            .unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{errors}");
        errors
    }

    fn error(&self) -> String {
        format!("{:#}", Model::load(self.0.path()).err().unwrap())
    }
}

fn scaled(logits: &[f32], factor: f32) -> Vec<f32> {
    logits.iter().map(|logit| logit * factor).collect()
}

/// transformers 4 has `tie_word_embeddings`. Version 5 writes it as true always, and `scale_decoder_outputs` beside it.
#[test]
fn head_is_scaled_and_tied_as_each_version_of_transformers_means() {
    let folder = Folder::new();
    let tied = folder.logits();
    folder.change(|config| {
        config
            .as_object_mut()
            .unwrap()
            .remove("tie_word_embeddings");
    });
    assert_eq!(folder.logits(), tied);
    folder.change(|config| {
        config["tie_word_embeddings"] = true.into();
        config["scale_decoder_outputs"] = false.into();
    });
    crate::model::assert_close(&folder.logits(), &scaled(&tied, 4.0), 1e-4);
    // An untied model that version 5 has saved: its own head, not scaled.
    folder.change_weights(|tensors| {
        let head = (&tensors["shared.weight"] * 2.0).unwrap();
        tensors.insert("lm_head.weight".into(), head);
    });
    crate::model::assert_close(&folder.logits(), &scaled(&tied, 8.0), 1e-4);
    let (config, tensors) = network::load(folder.0.path()).unwrap();
    assert!(!config.tie_word_embeddings && tensors.contains_key("lm_head.weight"));
    // It is written so that both versions read it.
    let (json, changes) = config.to_json("float32");
    assert_eq!(json["tie_word_embeddings"], false);
    assert_eq!(changes.len(), 1);
    // Version 4 ties by the flag alone.
    folder.change(|config| {
        config
            .as_object_mut()
            .unwrap()
            .remove("scale_decoder_outputs");
    });
    assert_eq!(folder.logits(), tied);
}

/// mT5: version 4 unties by default and scales a tied head, version 5 never scales.
#[test]
fn mt5_head_depends_on_the_version_that_wrote_the_folder() {
    let folder = Folder::new();
    let tied = folder.logits();
    assert!(!folder.generate().contains("read as by version"));
    folder.change(|config| config["model_type"] = "mt5".into());
    assert_eq!(folder.logits(), tied);
    let errors = folder.generate();
    assert!(errors.contains("read as by version 4"), "{errors}");
    folder.change(|config| config["transformers_version"] = "5.24.0".into());
    crate::model::assert_close(&folder.logits(), &scaled(&tied, 4.0), 1e-4);
    folder.change(|config| {
        config
            .as_object_mut()
            .unwrap()
            .remove("tie_word_embeddings");
    });
    assert!(
        folder.error().contains("lm_head.weight"),
        "{}",
        folder.error()
    );
}

#[test]
fn end_token_that_is_not_the_tokenizers_is_named() {
    let folder = Folder::new();
    assert!(!folder.generate().contains("eos_token"));
    folder.change(|config| config["eos_token_id"] = 5.into());
    let errors = folder.generate();
    assert!(errors.contains("answers end with the token 5"), "{errors}");
}

/// A T5 with random weights hardly learns without `train.scale_parameter`, and with it needs a high learning rate.
#[test]
fn learning_rates_that_do_not_fit_are_named() {
    let (dir, config) = run_folder();
    let rows = dir.path().join("rows.jsonl");
    for (settings, expected) in [
        ("learning_rate = 3e-4", Some("hardly learns")),
        (
            "learning_rate = 3e-4\nscale_parameter = true",
            Some("is small with"),
        ),
        ("learning_rate = 1e-2\nscale_parameter = true", None),
    ] {
        let path = dir.path().join("run.toml");
        let text = format!(
            "run_dir = {:?}\n[data]\nsource = {rows:?}\n[student]\ninit = \"random\"\nmodel_type = \"t5\"\npath = {:?}\n\
             hidden_size = 16\nintermediate_size = 32\nnum_hidden_layers = 1\nnum_attention_heads = 2\n[loss]\n\
             kd = \"none\"\n[train]\nsteps = 1\n{settings}\n",
            config.run_dir, config.student.path,
        );
        fs::write(&path, text).unwrap();
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_distill"))
            .args(["train", "--fresh", "-c"])
            .arg(&path)
            .output()
            .unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{errors}");
        for warning in ["hardly learns", "is small with"] {
            assert_eq!(
                errors.contains(warning),
                expected == Some(warning),
                "{errors}"
            );
        }
    }
}

#[test]
fn old_files_with_copies_of_the_embedding_and_an_extra_bias_load() {
    let folder = Folder::new();
    let expected = folder.logits();
    folder.change_weights(|tensors| {
        let shared = tensors["shared.weight"].clone();
        tensors.insert("encoder.embed_tokens.weight".into(), shared.clone());
        tensors.insert("decoder.embed_tokens.weight".into(), shared.clone());
        tensors.insert("lm_head.weight".into(), shared);
        let bias =
            tensors["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].clone();
        let name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight";
        tensors.insert(name.into(), bias);
    });
    assert_eq!(folder.logits(), expected);
    folder.change_weights(|tensors| {
        tensors.remove("shared.weight");
    });
    assert_eq!(folder.logits(), expected);
    // The command says what it does not use, and nothing about the copies.
    let errors = folder.generate();
    assert!(
        errors.contains("EncDecAttention.relative_attention_bias"),
        "{errors}"
    );
    assert!(!errors.contains("embed_tokens"), "{errors}");
    // A copy that differs is named.
    folder.change_weights(|tensors| {
        let other = (&tensors["decoder.embed_tokens.weight"] * 3.0).unwrap();
        tensors.insert("decoder.embed_tokens.weight".into(), other);
        let first = tensors["encoder.embed_tokens.weight"].clone();
        tensors.insert("shared.weight".into(), first);
    });
    assert_eq!(folder.logits(), expected);
    let errors = folder.generate();
    assert!(
        errors.contains("differ from shared.weight: decoder.embed_tokens.weight"),
        "{errors}"
    );
}

#[test]
fn sizes_and_settings_that_cannot_work_are_refused() {
    for (field, value, expected) in [
        ("feed_forward_proj", json!("gated-silu"), "gated-silu"),
        ("dense_act_fn", json!("relu"), "dense_act_fn"),
        ("is_gated_act", json!(false), "is_gated_act"),
        ("relative_attention_num_buckets", json!(6), "multiple of 4"),
        ("relative_attention_num_buckets", json!(0), "multiple of 4"),
        (
            "relative_attention_max_distance",
            json!(16),
            "more than half",
        ),
        ("num_layers", json!(0), "number of layers"),
        ("num_layers", json!(1u64 << 50), "number of layers"),
        ("num_layers", json!(2), "`num_layers` = 2"),
        ("num_decoder_layers", json!(1), "`num_decoder_layers` = 1"),
        ("num_heads", json!(0), "attention width"),
        ("d_kv", json!(9), "requires [18, 16]"),
        (
            "decoder_start_token_id",
            json!(5000),
            "decoder_start_token_id",
        ),
    ] {
        let folder = Folder::new();
        folder.change(|config| config[field] = value.clone());
        let error = folder.error();
        assert!(error.contains(expected), "{field} = {value}: {error}");
    }
}

/// A student with the same layers in another folder keeps the position bias of layer 0, although layer 0 is dropped.
#[test]
fn kept_layers_have_their_weights_and_the_shared_position_bias() {
    let folder = Folder::new();
    let (config, tensors) = network::load(folder.0.path()).unwrap();
    let mut settings = student();
    settings.init = StudentInit::Layers;
    settings.encoder_layers = Some(LayerChoice::Indices(vec![1, 2]));
    settings.decoder_layers = Some(LayerChoice::Count(1));
    let (kept_config, kept, layers) = keep_layers(&config, tensors.clone(), &settings).unwrap();
    assert_eq!(
        layers.to_string(),
        "encoder layers 1, 2 of 3; decoder layers 0 of 2"
    );
    let json = kept_config.to_json("float32").0;
    assert_eq!(
        (&json["num_layers"], &json["num_decoder_layers"]),
        (&json!(2), &json!(1))
    );
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (new, old) in [
        (
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "encoder.block.1.layer.0.SelfAttention.q.weight",
        ),
        (
            "encoder.block.1.layer.1.DenseReluDense.wo.weight",
            "encoder.block.2.layer.1.DenseReluDense.wo.weight",
        ),
        (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        ("shared.weight", "shared.weight"),
    ] {
        assert_eq!(values(&kept[new]), values(&tensors[old]), "{new}");
    }
    assert!(!kept.keys().any(|name| name.contains("block.2.")));
    Model::new(kept_config, &kept).unwrap();
}

fn train_error(config: &Config) -> String {
    format!(
        "{:#}",
        train::run(config, StartMode::Fresh.into()).unwrap_err()
    )
}

#[test]
fn settings_that_do_not_fit_an_encoder_decoder_are_refused() {
    let (_dir, config) = run_folder();
    let with = |change: &dyn Fn(&mut Config)| {
        let mut config = config.clone();
        change(&mut config);
        config
    };
    let decoder = tempfile::tempdir().unwrap();
    tiny::write_model(decoder.path(), 1, 64);
    for (config, expected) in [
        (
            with(&|c| {
                c.student
                    .template_args
                    .insert("enable_thinking".into(), json!(true));
            }),
            "`student.template_args` are variables of a chat template",
        ),
        (
            // A llama with the tokenizer of a T5 has no chat template.
            with(&|c| {
                c.student.init = StudentInit::Random;
                c.student.num_key_value_heads = 2;
            }),
            "has no chat template",
        ),
        (
            with(&|c| {
                c.student.path = decoder.path().to_owned();
                c.student.source_template = Some("x".into());
            }),
            "`student.source_template` is for an encoder-decoder",
        ),
        (
            with(&|c| {
                c.student.init = StudentInit::Layers;
                c.student.decoder_layers = Some(LayerChoice::Indices(vec![0, 2]));
            }),
            "layer 2, which does not exist",
        ),
        (
            with(&|c| c.student.init = StudentInit::Layers),
            "set `student.decoder_layers`",
        ),
        (
            with(&|c| {
                c.teacher.local = Some(decoder.path().to_owned());
                c.loss.kd = KdMode::Tail;
            }),
            "is a decoder, and the student is an encoder-decoder",
        ),
        (
            with(&|c| c.student.source_template = Some("x {{ messages[-1]".into())),
            "`student.source_template` \"x {{ messages[-1]\" fails",
        ),
        (
            with(&|c| c.student.source_template = Some("x {{ nosuch }}".into())),
            "prints the same text for all messages",
        ),
        (
            with(&|c| c.student.source_template = Some(String::new())),
            "prints the same text for all messages",
        ),
        (
            with(&|c| c.train.freeze = vec!["embed_tokens".parse().unwrap()]),
            "the student's parameters are named like decoder.block.0",
        ),
        (
            with(&|c| c.data.max_source_length = 2),
            "`data.max_source_length`",
        ),
    ] {
        let error = train_error(&config);
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let mut settings = config.student.clone();
    settings.path = decoder.path().to_owned();
    settings.init = StudentInit::Layers;
    settings.encoder_layers = Some(LayerChoice::Count(1));
    let (shape, tensors) = network::load(decoder.path()).unwrap();
    let error = keep_layers(&shape, tensors, &settings)
        .unwrap_err()
        .to_string();
    assert!(error.contains("has no encoder"), "{error}");
}

#[test]
fn tokenizer_without_pad_token_cannot_start_a_random_encoder_decoder() {
    let (dir, config) = run_folder();
    let path = dir.path().join("model/tokenizer.json");
    let text = fs::read_to_string(&path).unwrap().replace("<pad>", "<p>");
    fs::write(&path, text).unwrap();
    fs::remove_file(dir.path().join("model/config.json")).unwrap();
    let mut settings = config.student.clone();
    settings.init = StudentInit::Random;
    settings.model_type = distill::config::StudentType::T5;
    let error = Tokenizer::for_student(&settings).unwrap_err().to_string();
    assert!(error.contains("needs pad_token"), "{error}");
}

/// The settings of a student with random weights, and number types.
#[test]
fn settings_of_another_architecture_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    for (student, expected) in [
        ("num_encoder_layers = 3", "a llama has no encoder"),
        (
            "model_type = \"t5\"\nnum_key_value_heads = 4",
            "student.num_key_value_heads",
        ),
        (
            "model_type = \"t5\"\nrope_theta = 500.0",
            "student.rope_theta",
        ),
        ("decoder_layers = 2", "must be \"layers\""),
        (
            "decoder_layers = \"two\"",
            "a number of layers, or a list of layer indices",
        ),
        ("[train]\ndtype = \"f16\"", "`auto`, `f32`, `bf16`"),
    ] {
        fs::write(&path, format!("[student]\ninit = \"random\"\n{student}\n")).unwrap();
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_distill"))
            .args(["train", "-c"])
            .arg(&path)
            .output()
            .unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{errors}");
        assert!(errors.contains(expected), "{student}: {errors}");
    }
}

#[test]
fn folder_with_a_sentencepiece_file_alone_says_how_to_convert_it() {
    let (dir, config) = run_folder();
    let model = dir.path().join("model");
    fs::rename(model.join("tokenizer.json"), model.join("spiece.model")).unwrap();
    let error = train_error(&config);
    assert!(error.contains("convert its spiece.model"), "{error}");
    let error = Tokenizer::load(&model).unwrap_err().to_string();
    assert!(error.contains("convert its spiece.model"), "{error}");
}

/// The tokenizer's folder may be that of a decoder, whose `generation_config.json` has no such token.
#[test]
fn generation_config_names_the_first_token_of_the_decoder() {
    let (dir, config) = run_folder();
    let path = dir.path().join("model/generation_config.json");
    write_json(&path, &json!({"eos_token_id": 1, "max_length": 20}));
    train::run(&config, StartMode::Fresh.into()).unwrap();
    let text = fs::read_to_string(config.student_dir().join("generation_config.json")).unwrap();
    let saved: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        saved,
        json!({"eos_token_id": 1, "max_length": 20, "decoder_start_token_id": 0})
    );
}
