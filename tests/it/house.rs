//! The invariants of `src/lib.rs` that can be checked in the source.

use std::path::{Path, PathBuf};

/// Returns the path below `src/` and the code of every source file, without comment lines, unit tests and `tests.rs`
/// files.
pub(crate) fn sources() -> Vec<(String, String)> {
    fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, files);
            } else {
                files.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    files.retain(|path| {
        let is_tests = path.file_name().is_some_and(|name| name == "tests.rs");
        if is_tests {
            assert_is_only_for_tests(path);
        }
        !is_tests
    });
    files
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap();
            let code: String = text
                .split("#[cfg(test)]\nmod tests")
                .next()
                .unwrap()
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"))
                .flat_map(|line| [line, "\n"])
                .collect();
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap();
            (name.replace('\\', "/"), code)
        })
        .collect()
}

/// Checks that the parent module of a `tests.rs` compiles it only for tests.
fn assert_is_only_for_tests(path: &Path) {
    let folder = path.parent().unwrap();
    let parents = [folder.join("mod.rs"), folder.with_extension("rs")];
    let parent = parents.iter().find(|path| path.exists()).unwrap();
    let text = std::fs::read_to_string(parent).unwrap();
    assert!(
        text.contains("#[cfg(test)]\nmod tests;"),
        "{}",
        path.display()
    );
}

/// Returns the files whose code contains one of `words`.
fn files_with(words: &[&str]) -> Vec<String> {
    sources()
        .into_iter()
        .filter(|(_, code)| words.iter().any(|word| code.contains(word)))
        .map(|(name, _)| name)
        .collect()
}

/// Checks that only files whose path begins with one of `rooms` contain one of `words`.
#[track_caller]
fn only_in(words: &[&str], rooms: &[&str]) {
    for name in files_with(words) {
        let is_allowed = rooms.iter().any(|room| name.starts_with(room));
        assert!(
            is_allowed,
            "{name} contains one of {words:?}, which are allowed only in {rooms:?}"
        );
    }
    assert!(
        !files_with(words).is_empty(),
        "no file contains {words:?}: the test is out of date"
    );
}

#[test]
fn tensor_and_network_crates_are_used_in_separate_rooms() {
    only_in(&["candle_"], &["model/", "ops/", "train/"]);
    // log.rs names the crates to silence their logs; fuzz.rs parses headers.
    only_in(
        &["reqwest", "async_openai"],
        &["client/", "rate_limit/", "harvest/fuzz.rs", "log.rs"],
    );
    only_in(&["axum"], &["serve/", "mock/"]);
    only_in(&["clap"], &["cli.rs", "commands/completions.rs", "main.rs"]);
}

#[test]
fn unsafe_code_is_only_in_ops_with_a_safety_comment_per_block() {
    only_in(&["unsafe {"], &["ops/"]);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for name in files_with(&["unsafe {"]) {
        let text = std::fs::read_to_string(root.join(&name)).unwrap();
        let count = |word: &str| text.matches(word).count();
        let blocks = count("unsafe {") + count("unsafe impl");
        assert_eq!(blocks, count("// SAFETY:"), "{name}");
    }
}

#[test]
fn files_are_written_only_by_fs_and_cache_storage() {
    only_in(
        &[
            "fs::write(",
            " File::create",
            "(File::create",
            "fs::File::create",
            "OpenOptions::new",
            "File::options",
            "fs::rename",
            "fs::copy(",
        ],
        &["fs/", "cache/storage.rs"],
    );
}

#[test]
fn api_key_is_exposed_in_one_expression() {
    let expressions: usize = sources()
        .iter()
        .map(|(_, code)| code.matches("expose_secret(").count())
        .sum();
    assert_eq!(expressions, 1);
}

#[test]
fn unwrap_expect_and_todo_are_only_in_tests() {
    for (name, code) in sources() {
        for word in [
            ".unwrap()",
            ".expect(",
            "todo!(",
            "unimplemented!(",
            "dbg!(",
        ] {
            assert!(!code.contains(word), "{name} contains {word}");
        }
    }
}
