//! Files and folders are written atomically.

use std::fs;
use std::io::Write;

use distill::fs::{AtomicFile, commit_dir, create_dir_all, write_atomic, write_dir_with};

/// Returns the names in a folder, sorted.
fn names(folder: &std::path::Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn write_atomic_replaces_the_file_and_leaves_no_temporary_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.html");
    for content in ["first, and longer", "second"] {
        write_atomic(&path, content.as_bytes()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), content);
    }
    // A reader that has opened the old file still reads it, because the new one is another file.
    let old = fs::File::open(&path).unwrap();
    write_atomic(&path, b"third").unwrap();
    assert_eq!(std::io::read_to_string(old).unwrap(), "second");
    assert_eq!(names(dir.path()), ["report.html"]);
}

#[test]
fn failed_write_names_its_file_and_cleans_up() {
    let dir = tempfile::tempdir().unwrap();
    // The path is a folder, so the rename fails.
    let path = dir.path().join("folder");
    create_dir_all(&path.join("inside")).unwrap();
    let error = write_atomic(&path, b"x").unwrap_err();
    assert!(error.to_string().contains("folder"), "{error}");
    assert_eq!(names(dir.path()), ["folder"]);
    let error = write_atomic(&dir.path().join("missing/file"), b"x").unwrap_err();
    assert!(error.to_string().contains("missing/file"), "{error}");
}

#[cfg(unix)]
#[test]
fn written_file_has_default_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let mode = |name: &str| {
        let path = dir.path().join(name);
        fs::metadata(path).unwrap().permissions().mode()
    };
    write_atomic(&dir.path().join("ours"), b"x").unwrap();
    fs::write(dir.path().join("plain"), b"x").unwrap();
    assert_eq!(mode("ours"), mode("plain"));
}

#[test]
fn commit_dir_renames_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let [temporary, destination] = [".tmp-step", "step-000500"].map(|name| dir.path().join(name));
    create_dir_all(&temporary.join("nested/deeper")).unwrap();
    create_dir_all(&temporary.join("nested/deeper")).unwrap();
    fs::write(temporary.join("nested/state.json"), "{}").unwrap();
    commit_dir(&temporary, &destination).unwrap();
    assert_eq!(names(dir.path()), ["step-000500"]);
    assert_eq!(
        fs::read_to_string(destination.join("nested/state.json")).unwrap(),
        "{}"
    );

    create_dir_all(&temporary).unwrap();
    let error = commit_dir(&temporary, &destination).unwrap_err();
    assert!(error.to_string().contains("step-000500"), "{error}");
    assert!(
        destination.join("nested/state.json").exists(),
        "the failed commit removed a committed file"
    );
}

#[test]
fn atomic_file_gets_its_name_at_commit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    let begin = |text: &str| {
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    };
    drop(begin("dropped"));
    assert!(names(dir.path()).is_empty());
    let (first, second, third) = (begin("first"), begin("second"), begin("third"));
    assert!(!path.exists());
    first.commit(false).unwrap();
    // `first` has created the path since `second` was begun.
    let error = second.commit(false).unwrap_err();
    assert!(error.to_string().contains("rows.jsonl"), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "first");
    third.commit(true).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "third");
    assert_eq!(names(dir.path()), ["rows.jsonl"]);
}

#[test]
fn failed_write_dir_leaves_the_old_folder() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dataset");
    let fill = |text: &'static str| {
        move |folder: &std::path::Path| write_atomic(&folder.join("rows"), text.as_bytes())
    };
    write_dir_with(&path, fill("first")).unwrap();
    let failed: anyhow::Result<()> = write_dir_with(&path, |folder| {
        fill("second")(folder)?;
        anyhow::bail!("the source is damaged")
    });
    assert_eq!(failed.unwrap_err().to_string(), "the source is damaged");
    assert_eq!(names(dir.path()), ["dataset"]);
    assert_eq!(fs::read_to_string(path.join("rows")).unwrap(), "first");
    write_dir_with(&path, fill("third")).unwrap();
    assert_eq!(fs::read_to_string(path.join("rows")).unwrap(), "third");
    assert_eq!(names(dir.path()), ["dataset"]);
}

#[cfg(unix)]
#[test]
fn links_stay_and_their_files_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let [folder, file] = ["folder", "folder/file"].map(|name| dir.path().join(name));
    let [folder_link, file_link] = ["folder link", "file link"].map(|name| dir.path().join(name));
    create_dir_all(&folder).unwrap();
    fs::write(&file, "old").unwrap();
    std::os::unix::fs::symlink(&folder, &folder_link).unwrap();
    std::os::unix::fs::symlink(&file, &file_link).unwrap();
    write_atomic(&file_link, b"new").unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"new");
    write_dir_with(&folder_link, |folder| {
        write_atomic(&folder.join("file"), b"newer")
    })
    .unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"newer");
    assert!(file_link.is_symlink() && folder_link.is_symlink());
    assert_eq!(names(dir.path()), ["file link", "folder", "folder link"]);
}

#[cfg(unix)]
#[test]
fn pipe_is_not_replaced_by_a_file() {
    use std::os::unix::fs::FileTypeExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("summary.json");
    let status = std::process::Command::new("mkfifo").arg(&path).status();
    assert!(status.unwrap().success());
    // Without a reader, opening the pipe would wait.
    let error = write_atomic(&path, b"{}").unwrap_err();
    assert!(error.to_string().contains("summary.json"), "{error:#}");
    assert!(fs::metadata(&path).unwrap().file_type().is_fifo());
    assert_eq!(names(dir.path()), ["summary.json"]);
}

#[test]
fn pipe_in_a_model_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        let status = std::process::Command::new("mkfifo")
            .arg(dir.path().join(name))
            .status();
        assert!(status.unwrap().success());
    }
    let error = distill::fs::read_to_string(&dir.path().join("config.json")).unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
    let error = distill::model::weights::load_file(&dir.path().join("model.safetensors"));
    assert!(
        error
            .err()
            .unwrap()
            .to_string()
            .contains("not a regular file")
    );
    let error = distill::fs::read("/dev/zero".as_ref()).unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
}

#[test]
fn log_file_keeps_lines_with_invalid_utf8() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    std::fs::write(&path, b"one\ntw\xffo\nthree\ntorn").unwrap();
    let mut log = distill::fs::LogFile::open(&path, |line| line != "three").unwrap();
    log.write("four").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"one\ntw\xffo\ntorn\nfour\n");
}

#[test]
fn foreign_files_survive_rewriting_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("student");
    std::fs::create_dir_all(folder.join("notes")).unwrap();
    for (name, text) in [
        ("old.bin", "ours"),
        ("README.txt", "theirs"),
        ("notes/a", "theirs"),
    ] {
        std::fs::write(folder.join(name), text).unwrap();
    }
    write_dir_with(&folder, |new| {
        distill::fs::write_in(new, "new.bin", b"ours")?;
        distill::fs::copy_foreign_entries(&folder, new, |name| name.ends_with(".bin"))
    })
    .unwrap();
    assert!(!folder.join("old.bin").exists() && folder.join("new.bin").exists());
    for name in ["README.txt", "notes/a"] {
        assert_eq!(
            std::fs::read_to_string(folder.join(name)).unwrap(),
            "theirs"
        );
    }
}
