//! Exports to pipes, links and full files.

use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};

use super::{run, sample, sorted_paths, write_cache};

/// A shell's `ulimit -f` sends SIGXFSZ, which would end the process.
#[test]
fn export_beyond_the_limit_of_file_sizes_is_an_error() {
    let dir = write_cache((0..200).map(sample).collect());
    let output = std::process::Command::new("sh")
        .args([
            "-c",
            "ulimit -f 8; exec \"$0\" cache export --to trl --dir cache -o a.jsonl",
        ])
        .arg(env!("CARGO_BIN_EXE_distill"))
        .current_dir(dir.path())
        .output()
        .unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("could not write a.jsonl"), "{errors}");
    assert_eq!(sorted_paths(dir.path()).len(), 1);
}

#[test]
fn export_writes_to_a_pipe_and_reports_on_stderr() {
    let dir = write_cache(vec![sample(0), sample(1)]);
    let pipe = dir.path().join("pipe");
    let status = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(status.unwrap().success());
    let path = pipe.clone();
    let reader = std::thread::spawn(move || fs::read_to_string(path).unwrap());
    let output = run(
        dir.path(),
        &["--to", "trl", "--dir", "cache", "-o", "pipe", "--force"],
    );
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    let lines = reader.join().unwrap();
    assert_eq!(lines.lines().count(), 2, "{lines}");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
    assert!(errors.contains("2 rows in pipe"), "{errors}");
    assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
}

#[test]
fn export_follows_links_but_not_into_the_cache() {
    let dir = write_cache(vec![sample(0)]);
    let [target, link, into_cache] =
        ["target", "link", "into-cache"].map(|name| dir.path().join(name));
    fs::write(&target, "{\"prompt\":[],\"completion\":[]}\n").unwrap();
    symlink(&target, &link).unwrap();
    symlink(dir.path().join("cache/responses.jsonl"), &into_cache).unwrap();
    let export = |out| {
        run(
            dir.path(),
            &["--to", "trl", "--dir", "cache", "-o", out, "--force"],
        )
    };
    assert!(export("link").status.success());
    assert!(link.is_symlink());
    let exported = fs::read_to_string(&target).unwrap();
    assert!(exported.contains("assistant"), "{exported}");
    let output = export("into-cache");
    assert_eq!(output.status.code(), Some(2));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("cache folder"), "{errors}");
}

#[test]
fn export_ends_when_the_reader_of_its_pipe_does() {
    let dir = write_cache((0..2_000).map(sample).collect());
    let pipe = dir.path().join("pipe");
    let status = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(status.unwrap().success());
    let path = pipe.clone();
    let reader = std::thread::spawn(move || drop(fs::File::open(path).unwrap()));
    let output = run(dir.path(), &["--to", "trl", "--dir", "cache", "-o", "pipe"]);
    reader.join().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    assert!(!errors.contains("Broken pipe"), "{errors}");

    let output = run(dir.path(), &["--to", "hf", "--dir", "cache", "-o", "pipe"]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(errors.contains("not a folder"), "{errors}");
}
