//! The invariants of `src/lib.rs` that the source itself can show.

use std::path::{Path, PathBuf};

/// Every source file under `src/`, as its path below it and its code without its tests.
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
    // `mod tests;` is compiled for tests alone.
    files.retain(|path| {
        let is_tests = path.file_name().is_some_and(|name| name == "tests.rs");
        is_tests.then(|| assert_is_for_tests(path)).is_none()
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

/// The module that holds a `tests.rs` declares it for tests alone.
fn assert_is_for_tests(path: &Path) {
    let folder = path.parent().unwrap();
    let holders = [folder.join("mod.rs"), folder.with_extension("rs")];
    let holder = holders.iter().find(|path| path.exists()).unwrap();
    let text = std::fs::read_to_string(holder).unwrap();
    assert!(
        text.contains("#[cfg(test)]\nmod tests;"),
        "{}",
        path.display()
    );
}

/// The files whose code holds one of `words`.
fn holders(words: &[&str]) -> Vec<String> {
    sources()
        .into_iter()
        .filter(|(_, code)| words.iter().any(|word| code.contains(word)))
        .map(|(name, _)| name)
        .collect()
}

#[track_caller]
fn only_in(words: &[&str], rooms: &[&str]) {
    for name in holders(words) {
        let at_home = rooms.iter().any(|room| name.starts_with(room));
        assert!(
            at_home,
            "{name} holds one of {words:?}; its rooms are {rooms:?}"
        );
    }
    assert!(
        !holders(words).is_empty(),
        "nothing holds {words:?}: the test is out of date"
    );
}

#[test]
fn tensors_and_the_network_live_apart() {
    only_in(&["candle_"], &["model/", "ops/", "train/"]);
    // log.rs names them to silence them; fuzz.rs reads header lines.
    only_in(
        &["reqwest", "async_openai"],
        &["client/", "rate_limit/", "harvest/fuzz.rs", "log.rs"],
    );
    only_in(&["axum"], &["serve/", "mock/"]);
    only_in(&["clap"], &["cli.rs", "commands/completions.rs", "main.rs"]);
}

#[test]
fn unsafe_code_lives_in_ops_and_each_block_says_why() {
    only_in(&["unsafe {"], &["ops/"]);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for name in holders(&["unsafe {"]) {
        let text = std::fs::read_to_string(root.join(&name)).unwrap();
        let count = |word: &str| text.matches(word).count();
        let places = count("unsafe {") + count("unsafe impl");
        assert_eq!(places, count("// SAFETY:"), "{name}");
    }
}

#[test]
fn files_are_written_in_two_places() {
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
        &["fs/", "cache/"],
    );
}

#[test]
fn the_key_is_exposed_in_one_expression() {
    let exposed: usize = sources()
        .iter()
        .map(|(_, code)| code.matches("expose_secret(").count())
        .sum();
    assert_eq!(exposed, 1);
}

#[test]
fn nothing_panics_on_purpose_outside_of_tests() {
    for (name, code) in sources() {
        for word in [
            ".unwrap()",
            ".expect(",
            "todo!(",
            "unimplemented!(",
            "dbg!(",
        ] {
            assert!(!code.contains(word), "{name} holds {word}");
        }
    }
}
