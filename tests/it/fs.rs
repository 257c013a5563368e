//! Files appear whole under their name, or not at all.

use std::fs;

use distill::fs::{commit_dir, create_dir_all, write_atomic};

fn names(folder: &std::path::Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_file_is_replaced_whole_and_leaves_nothing_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.html");
    for content in ["first, and longer", "second"] {
        write_atomic(&path, content.as_bytes()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), content);
    }
    // A reader that holds the old file keeps it: the new one is another file.
    let old = fs::File::open(&path).unwrap();
    write_atomic(&path, b"third").unwrap();
    assert_eq!(std::io::read_to_string(old).unwrap(), "second");
    assert_eq!(names(dir.path()), ["report.html"]);
}

#[test]
fn a_failed_write_names_its_file_and_cleans_up() {
    let dir = tempfile::tempdir().unwrap();
    // A folder is in the way of the rename.
    let path = dir.path().join("taken");
    create_dir_all(&path.join("inside")).unwrap();
    let error = write_atomic(&path, b"x").unwrap_err();
    assert!(error.to_string().contains("taken"), "{error}");
    assert_eq!(names(dir.path()), ["taken"]);
    let error = write_atomic(&dir.path().join("missing/file"), b"x").unwrap_err();
    assert!(error.to_string().contains("missing/file"), "{error}");
}

#[cfg(unix)]
#[test]
fn a_written_file_has_the_permissions_of_any_new_file() {
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
fn a_folder_is_committed_under_its_final_name() {
    let dir = tempfile::tempdir().unwrap();
    let [temporary, last] = [".tmp-step", "step-000500"].map(|name| dir.path().join(name));
    create_dir_all(&temporary.join("nested/deeper")).unwrap();
    create_dir_all(&temporary.join("nested/deeper")).unwrap();
    fs::write(temporary.join("nested/state.json"), "{}").unwrap();
    commit_dir(&temporary, &last).unwrap();
    assert_eq!(names(dir.path()), ["step-000500"]);
    assert_eq!(
        fs::read_to_string(last.join("nested/state.json")).unwrap(),
        "{}"
    );

    create_dir_all(&temporary).unwrap();
    let error = commit_dir(&temporary, &last).unwrap_err();
    assert!(error.to_string().contains("step-000500"), "{error}");
    assert!(
        last.join("nested/state.json").exists(),
        "what was committed stays"
    );
}
