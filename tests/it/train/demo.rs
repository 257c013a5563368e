//! `distill demo` does not overwrite files of the user.

use std::process::Command;

#[test]
fn demo_refuses_a_folder_with_user_files_and_leaves_them_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["prompts.jsonl", "kl.toml"] {
        std::fs::write(dir.path().join(name), "mine").unwrap();
    }
    let output = Command::new(env!("CARGO_BIN_EXE_distill"))
        .args(["demo", "--dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(errors.contains("the demo did not write"), "{errors}");
    let mut names: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["kl.toml", "prompts.jsonl"]);
    for name in names {
        assert_eq!(std::fs::read(dir.path().join(name)).unwrap(), b"mine");
    }
}
