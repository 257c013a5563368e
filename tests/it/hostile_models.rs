//! Row X6: model folders that are damaged, or meant to do harm, are refused by name.

use std::fs;
use std::path::Path;

use distill::model::Model;
use serde_json::{Value, json};

use crate::tiny;

/// What is done to a good folder, and a word of the complaint.
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

/// Edits the header of the weights, as JSON; what follows it stays.
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

/// Puts the weights where an index says that they are.
fn index(file: &'static str) -> Box<dyn Fn(&Path)> {
    Box::new(move |dir| {
        fs::rename(dir.join("model.safetensors"), dir.join("part.safetensors")).unwrap();
        let map = json!({"weight_map": {"model.norm.weight": file}});
        fs::write(dir.join("model.safetensors.index.json"), map.to_string()).unwrap();
    })
}

fn cases() -> Vec<Case> {
    let norm = "model.norm.weight";
    vec![
        ("outside", index("../secret.safetensors"), "not inside"),
        ("absolute", index("/etc/passwd"), "not inside"),
        (
            "missing shard",
            index("other.safetensors"),
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
        ("empty", weights(Vec::clear), "safetensors"),
        ("cut", weights(|bytes| bytes.truncate(500)), "safetensors"),
        (
            "short by a byte",
            weights(|bytes| {
                bytes.pop();
            }),
            "safetensors",
        ),
        (
            "endless header",
            weights(|bytes| bytes[..8].fill(0xff)),
            "safetensors",
        ),
        (
            "past the end",
            header(move |h| h[norm]["data_offsets"] = json!([0, 1u64 << 60])),
            "safetensors",
        ),
        (
            "backwards",
            header(move |h| h[norm]["data_offsets"] = json!([128, 0])),
            "safetensors",
        ),
        (
            "overlapping",
            header(move |h| h[norm]["data_offsets"] = json!([0, 128])),
            "safetensors",
        ),
        (
            "another shape",
            header(move |h| h[norm]["shape"] = json!([16, 2])),
            "model.norm.weight",
        ),
        (
            "integers",
            header(move |h| h[norm]["dtype"] = json!("I32")),
            "model.norm.weight",
        ),
        (
            "a missing tensor",
            header(move |h| {
                let tensor = h.as_object_mut().unwrap().remove(norm).unwrap();
                h["model.other.weight"] = tensor;
            }),
            "model.norm.weight",
        ),
        (
            "no config",
            Box::new(|dir| fs::remove_file(dir.join("config.json")).unwrap()),
            "config.json",
        ),
        (
            "no JSON",
            Box::new(|dir| fs::write(dir.join("config.json"), "{").unwrap()),
            "config.json",
        ),
        ("another model", set("model_type", json!("bert")), "bert"),
        ("no kind", set("model_type", Value::Null), "model_type"),
        (
            "no heads",
            set("num_attention_heads", json!(0)),
            "num_attention_heads",
        ),
        (
            "uneven heads",
            set("num_key_value_heads", json!(3)),
            "multiple",
        ),
        ("odd channels", set("head_dim", json!(7)), "head_dim"),
        ("negative", set("hidden_size", json!(-1)), "config.json"),
        (
            "layers without end",
            set("num_hidden_layers", json!(1u64 << 50)),
            "layers",
        ),
        (
            "a vocabulary without end",
            set("vocab_size", json!(1u64 << 60)),
            "vocabulary",
        ),
        (
            "no positions",
            set("max_position_embeddings", json!(0)),
            "positions",
        ),
        (
            "another activation",
            set("hidden_act", json!("relu")),
            "relu",
        ),
        (
            "another rotary embedding",
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
fn damaged_and_hostile_folders_are_refused_by_name() {
    for (name, harm, word) in cases() {
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
        harm(&dir);
        let error = Model::load(&dir).err();
        let message = error.map(|error| format!("{error:#}"));
        let message = message.unwrap_or_else(|| panic!("{name} was loaded"));
        assert!(message.contains(word), "{name}: {message}");
    }
}

#[test]
fn a_context_longer_than_any_is_no_reason_to_fill_the_memory() {
    let dir = tempfile::tempdir().unwrap();
    tiny::write_model(dir.path(), 1, 64);
    edit_config(dir.path(), |config| {
        config["max_position_embeddings"] = json!(1u64 << 40);
    });
    let model = Model::load(dir.path()).unwrap();
    assert_eq!(model.config().max_position_embeddings, 1 << 17);
}
