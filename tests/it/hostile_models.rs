//! Damaged and malicious model folders are rejected with an error that names the cause.

use std::fs;
use std::path::Path;

use distill::model::Model;
use serde_json::{Value, json};

use crate::tiny;

/// The name of a case, the damage done to a valid folder, and a part of the expected error.
type Case = (&'static str, Box<dyn Fn(&Path)>, &'static str);

fn edit_config(dir: &Path, edit: impl Fn(&mut Value)) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(path, config.to_string()).unwrap();
}

fn set(key: &'static str, value: Value) -> Box<dyn Fn(&Path)> {
    Box::new(move |dir| edit_config(dir, |config| config[key] = value.clone()))
}

/// Edits the bytes of the weights.
fn weights(edit: impl Fn(&mut Vec<u8>) + 'static) -> Box<dyn Fn(&Path)> {
    Box::new(move |dir| {
        let path = dir.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        edit(&mut bytes);
        fs::write(path, bytes).unwrap();
    })
}

/// Edits the JSON header of the weights. The data after it does not change.
fn header(edit: impl Fn(&mut Value) + 'static) -> Box<dyn Fn(&Path)> {
    weights(move |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        edit(&mut header);
        let header = header.to_string().into_bytes();
        let mut changed = (header.len() as u64).to_le_bytes().to_vec();
        changed.extend(header);
        changed.extend(&bytes[8 + length..]);
        *bytes = changed;
    })
}

/// Replaces the weights by a shard, and an index that lists `file`.
fn index_with(file: &'static str) -> Box<dyn Fn(&Path)> {
    Box::new(move |dir| {
        fs::rename(dir.join("model.safetensors"), dir.join("part.safetensors")).unwrap();
        let map = json!({"weight_map": {"model.norm.weight": file}});
        fs::write(dir.join("model.safetensors.index.json"), map.to_string()).unwrap();
    })
}

fn cases() -> Vec<Case> {
    let norm = "model.norm.weight";
    vec![
        (
            "index outside the folder",
            index_with("../secret.safetensors"),
            "not inside",
        ),
        (
            "index with absolute path",
            index_with("/etc/passwd"),
            "not inside",
        ),
        (
            "missing shard",
            index_with("other.safetensors"),
            "other.safetensors",
        ),
        (
            "pickle",
            Box::new(|dir| {
                let old = dir.join("model.safetensors");
                fs::rename(old, dir.join("pytorch_model.bin")).unwrap();
            }),
            "convert",
        ),
        ("empty weights", weights(Vec::clear), "safetensors"),
        (
            "truncated weights",
            weights(|bytes| bytes.truncate(500)),
            "safetensors",
        ),
        (
            "short by a byte",
            weights(|bytes| {
                bytes.pop();
            }),
            "safetensors",
        ),
        (
            "header longer than the file",
            weights(|bytes| bytes[..8].fill(0xff)),
            "safetensors",
        ),
        (
            "tensor past the end of the file",
            header(move |h| h[norm]["data_offsets"] = json!([0, 1u64 << 60])),
            "safetensors",
        ),
        (
            "tensor with a negative length",
            header(move |h| h[norm]["data_offsets"] = json!([128, 0])),
            "safetensors",
        ),
        (
            "overlapping tensors",
            header(move |h| h[norm]["data_offsets"] = json!([0, 128])),
            "safetensors",
        ),
        (
            "wrong shape",
            header(move |h| h[norm]["shape"] = json!([16, 2])),
            "model.norm.weight",
        ),
        (
            "integer weights",
            header(move |h| h[norm]["dtype"] = json!("I32")),
            "model.norm.weight",
        ),
        (
            "missing tensor",
            header(move |h| {
                let tensor = h.as_object_mut().unwrap().remove(norm).unwrap();
                h["model.other.weight"] = tensor;
            }),
            "model.norm.weight",
        ),
        (
            "missing config",
            Box::new(|dir| fs::remove_file(dir.join("config.json")).unwrap()),
            "config.json",
        ),
        (
            "invalid JSON",
            Box::new(|dir| fs::write(dir.join("config.json"), "{").unwrap()),
            "config.json",
        ),
        (
            "unknown model_type",
            set("model_type", json!("bert")),
            "bert",
        ),
        (
            "missing model_type",
            set("model_type", Value::Null),
            "model_type",
        ),
        (
            "zero heads",
            set("num_attention_heads", json!(0)),
            "num_attention_heads",
        ),
        (
            "uneven heads",
            set("num_key_value_heads", json!(3)),
            "multiple",
        ),
        ("odd head_dim", set("head_dim", json!(7)), "head_dim"),
        (
            "negative size",
            set("hidden_size", json!(-1)),
            "config.json",
        ),
        (
            "too many layers",
            set("num_hidden_layers", json!(1u64 << 50)),
            "layers",
        ),
        (
            "too large vocabulary",
            set("vocab_size", json!(1u64 << 60)),
            "vocabulary",
        ),
        (
            "zero positions",
            set("max_position_embeddings", json!(0)),
            "positions",
        ),
        (
            "unknown activation",
            set("hidden_act", json!("relu")),
            "relu",
        ),
        (
            "unknown rope scaling",
            set("rope_scaling", json!({"rope_type": "yarn"})),
            "yarn",
        ),
        (
            "more layers than weights",
            set("num_hidden_layers", json!(3)),
            "is missing from the weights",
        ),
    ]
}

#[test]
fn damaged_and_malicious_model_folders_are_rejected() {
    for (name, damage, expected) in cases() {
        let outer = tempfile::tempdir().unwrap();
        let dir = outer.path().join("model");
        fs::create_dir(&dir).unwrap();
        tiny::write_model(&dir, 1, 64);
        fs::copy(
            dir.join("model.safetensors"),
            outer.path().join("secret.safetensors"),
        )
        .unwrap();
        assert!(Model::load(&dir).is_ok());
        damage(&dir);
        let error = Model::load(&dir).err();
        let message = error.map(|error| format!("{error:#}"));
        let message = message.unwrap_or_else(|| panic!("{name} was loaded"));
        assert!(message.contains(expected), "{name}: {message}");
    }
}

#[test]
fn huge_context_is_capped_before_memory_is_allocated() {
    let dir = tempfile::tempdir().unwrap();
    tiny::write_model(dir.path(), 1, 64);
    edit_config(dir.path(), |config| {
        config["max_position_embeddings"] = json!(1u64 << 40);
    });
    let model = Model::load(dir.path()).unwrap();
    assert_eq!(model.config().max_position_embeddings, 1 << 17);
}
