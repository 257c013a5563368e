//! Prepared examples are reused by later runs, and prepared again after changes and damage.

use std::path::{Path, PathBuf};

use distill::cache::logprobs_view::LogprobsView;
use distill::cache::raw_token::RawToken;
use distill::cache::record::Record;
use distill::cache::view::RecordView;
use distill::config::Config;
use distill::data::batch::Batch;
use distill::data::dataset::{self, Dataset};
use distill::data::groups::Selection;
use distill::tokenizer::Tokenizer;

use super::align::same_tokenizer;
use super::dataset::{load, record, write_cache};
use super::{folder, tokenizer};

const ANSWERS: [&str; 3] = [
    "The capital of France is Paris.",
    "Grüße aus München, 日本 👋🏽",
    "A \"quoted\" line\nand a \\ \u{1}",
];

/// Returns records that are not sorted by key. Four of five have soft labels.
fn records(tokenizer: &Tokenizer, count: usize) -> Vec<Record> {
    (0..count)
        .map(|n| {
            let answer = ANSWERS[n % 3];
            let ids = tokenizer.encode_text(answer).unwrap();
            Record {
                key: blake3::hash(&[n as u8]).to_hex().to_string(),
                logprobs: (n % 5 != 4).then(|| same_tokenizer(tokenizer, &ids, 5).0),
                ..record(&format!("prompt {n}"), answer)
            }
        })
        .collect()
}

/// A run folder whose cache has records.
struct Run {
    _dir: tempfile::TempDir,
    config: Config,
    tokenizer: Tokenizer,
}

fn run(count: usize) -> Run {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer("bytelevel");
    let mut config = Config {
        run_dir: dir.path().join("run"),
        ..Config::default()
    };
    config.data.validation_share = 0.25;
    write_cache(&config.run_dir.join("cache"), &records(&tokenizer, count));
    Run {
        _dir: dir,
        config,
        tokenizer,
    }
}

impl Run {
    /// Loads the dataset. `is_new` is whether its examples must be prepared instead of reused.
    #[track_caller]
    fn load(&self, is_new: bool) -> Dataset {
        let data = load(&self.config, &self.tokenizer).unwrap();
        assert_eq!(data.is_new, is_new);
        data
    }

    /// Returns the folders of prepared examples.
    fn folders(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.config.run_dir.join("prepared")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

/// Returns all training examples as one batch, and all validation examples.
fn batches(data: &Dataset) -> [Batch; 2] {
    [data.train(), data.validation()].map(|examples| Batch::new(examples.iter()))
}

#[test]
fn second_run_reuses_the_prepared_examples() {
    let run = run(40);
    let first = run.load(true);
    let second = run.load(false);
    assert_eq!(first.train().len() + second.validation().len(), 40);
    assert_eq!(batches(&first), batches(&second));
    assert_eq!(first.report, second.report);
    assert_eq!(first.fingerprint(), second.fingerprint());
    // A dataset in memory has the same examples, sorted by key, for any number of threads.
    let cache = run.config.run_dir.join("cache");
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let held_out = || dataset::held_out(&cache, &run.config.data, &run.tokenizer).unwrap();
        let data = pool.unwrap().install(held_out);
        let keys: Vec<&str> = data.validation().iter().map(|e| e.key()).collect();
        assert!(keys.len() == 40 && keys.is_sorted());
        let [_, in_memory] = batches(&data);
        let mut prepared = [first.train(), first.validation()]
            .map(|examples| examples.iter().collect::<Vec<_>>())
            .concat();
        prepared.sort_by_key(|example| example.key());
        assert_eq!(Batch::new(prepared), in_memory);
        assert_eq!(data.report.mean_mapped_mass, first.report.mean_mapped_mass);
    }
}

#[test]
fn prepared_examples_match_their_answers() {
    let run = run(20);
    let data = run.load(true);
    let records = records(&run.tokenizer, 20);
    for example in data.train().iter() {
        let record = records.iter().find(|r| r.key == example.key()).unwrap();
        let batch = Batch::new([example]);
        let ids = run.tokenizer.encode_text(&record.answer.text).unwrap();
        let end = run.tokenizer.stop_ids()[0];
        assert_eq!(batch.labels_N, [ids.as_slice(), &[end]].concat());
        let expected = match record.logprobs {
            Some(_) => same_tokenizer(&run.tokenizer, &ids, 5).1,
            None => Vec::new(),
        };
        let logprobs: Vec<f32> = expected.iter().flat_map(|l| l.logprobs.clone()).collect();
        let soft: Vec<u32> = expected.iter().flat_map(|l| l.ids.clone()).collect();
        assert_eq!(batch.soft_ids_NK, soft);
        let bits = |l: &[f32]| l.iter().map(|l| l.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&batch.soft_logprobs_NK), bits(&logprobs));
    }
}

/// A change may require new examples, and it may change the training. If the new examples equal the old ones, the
/// training does not change.
#[test]
fn examples_are_prepared_again_only_after_relevant_changes() {
    type Change = fn(&mut Run);
    let grow: Change = |run| {
        let more = records(&run.tokenizer, 21).split_off(20);
        write_cache(&run.config.run_dir.join("cache"), &more);
    };
    let other_tokenizer: Change = |run| {
        let copy = run.config.run_dir.join("tokenizer");
        std::fs::create_dir(&copy).unwrap();
        for entry in std::fs::read_dir(folder("bytelevel")).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
        }
        let template = "{{ messages[0].content }} {{ messages[1].content }} \
            {{ messages[2].content }}: {{ messages[3].content }}<|im_end|>";
        std::fs::write(copy.join("chat_template.jinja"), template).unwrap();
        run.tokenizer = Tokenizer::load(&copy).unwrap();
    };
    // Name of the change, the change, whether examples are prepared again, and whether the training differs.
    let cases: [(&str, Change, bool, bool); 6] = [
        ("nothing", |_| {}, false, false),
        (
            "length",
            |run| run.config.data.max_length = 1000,
            true,
            false,
        ),
        (
            "share",
            |run| run.config.data.validation_share = 0.5,
            false,
            true,
        ),
        (
            "training",
            |run| run.config.train.batch_size = 1,
            false,
            false,
        ),
        ("cache", grow, true, true),
        ("template", other_tokenizer, true, true),
    ];
    for (name, change, prepares_again, training_differs) in cases {
        let mut run = run(20);
        let before = run.load(true);
        change(&mut run);
        let after = load(&run.config, &run.tokenizer).unwrap();
        assert_eq!(after.is_new, prepares_again, "{name}");
        let fingerprints_differ = before.fingerprint() != after.fingerprint();
        assert_eq!(fingerprints_differ, training_differs, "{name}");
    }
}

#[test]
fn order_of_answers_does_not_change_the_training() {
    let reversed_run = run(0);
    let run = run(20);
    let mut reversed = records(&run.tokenizer, 20);
    reversed.reverse();
    write_cache(&reversed_run.config.run_dir.join("cache"), &reversed);
    let data = run.load(true);
    let reversed_data = reversed_run.load(true);
    // The folders have different names, because the cache files differ.
    assert_ne!(
        run.folders()[0].file_name(),
        reversed_run.folders()[0].file_name()
    );
    assert_eq!(data.fingerprint(), reversed_data.fingerprint());
    assert_eq!(batches(&data), batches(&reversed_data));
}

#[test]
fn damaged_examples_are_prepared_again() {
    type Damage = fn(&Path);
    let truncate: Damage = |file| {
        let bytes = std::fs::read(file).unwrap();
        std::fs::write(file, &bytes[..bytes.len() - 1]).unwrap();
    };
    let flip_bit: Damage = |file| {
        let mut bytes = std::fs::read(file).unwrap();
        let middle = bytes.len() * 2 / 3;
        bytes[middle] ^= 1;
        std::fs::write(file, bytes).unwrap();
    };
    let remove: Damage = |file| std::fs::remove_file(file).unwrap();
    let run = run(20);
    let expected = batches(&run.load(true));
    for name in ["shard-00000.safetensors", "order.safetensors", "index.json"] {
        // A flipped bit in the report of the index would change no example.
        let damages = match name {
            "index.json" => vec![truncate, remove],
            _ => vec![truncate, flip_bit, remove],
        };
        for damage in damages {
            damage(&run.folders()[0].join(name));
            assert_eq!(batches(&run.load(true)), expected, "{name}");
            assert_eq!(batches(&run.load(false)), expected, "{name}");
        }
    }
}

/// A run that is killed before it writes the index leaves a folder with a temporary name. An incomplete folder is also
/// detected under its final name.
#[test]
fn incomplete_folder_is_removed_and_prepared_again() {
    let run = run(20);
    let expected = batches(&run.load(true));
    let folder = run.folders().remove(0);
    // The temporary name belongs to other settings, so this run does not write the folder.
    let incomplete = folder.with_file_name(".0123456789abcdef.new");
    std::fs::rename(&folder, &incomplete).unwrap();
    std::fs::remove_file(incomplete.join("index.json")).unwrap();
    assert_eq!(batches(&run.load(true)), expected);
    assert_eq!(run.folders(), std::slice::from_ref(&folder));
    std::fs::remove_file(folder.join("index.json")).unwrap();
    assert_eq!(batches(&run.load(true)), expected);

    // A run that stops during the preparation leaves no folder.
    std::fs::remove_dir_all(&folder).unwrap();
    let stopped = dataset::load(
        &run.config.data,
        &run.config.run_dir,
        &Selection::All,
        &run.tokenizer,
        &mut |_, _| anyhow::bail!("stop"),
    );
    assert_eq!(stopped.unwrap_err().to_string(), "stop");
    assert!(run.folders().is_empty());
}

#[test]
fn two_newest_folders_are_kept() {
    let mut run = run(20);
    for (max_length, folders) in [(100, 1), (200, 2), (300, 2), (400, 2)] {
        run.config.data.max_length = max_length;
        run.load(true);
        assert_eq!(run.folders().len(), folders);
    }
    run.config.data.max_length = 300;
    run.load(false);
}

/// An additional space after `"logprobs":` makes the general JSON parser read the line.
#[test]
fn fast_line_reader_matches_the_json_parser() {
    let tokenizer = tokenizer("bytelevel");
    let mut records = records(&tokenizer, 9);
    let irregular = records[0].logprobs.as_mut().unwrap();
    irregular.logprob[0] = None;
    irregular.top_logprob[1][2] = None;
    irregular.top_logprob[2].truncate(1);
    irregular.top[3].clear();
    irregular.top[4][0].clear();
    irregular.raw.push(RawToken {
        position: 4,
        rank: 0,
        hex: "c3".into(),
    });
    // A text that contains the beginning of the logprobs field.
    records[1].answer.text = ",\"logprobs\":{\"token\":[".into();
    for record in &records {
        let line = distill::cache::line::encode(record).unwrap();
        let line = std::str::from_utf8(&line).unwrap().trim_end();
        let with_space = line.replacen("\"logprobs\":", "\"logprobs\": ", 1);
        let fast = RecordView::from_line(line.as_bytes()).unwrap();
        let general = RecordView::from_line(with_space.as_bytes()).unwrap();
        assert_eq!(fast.logprobs, general.logprobs);
        let expected = record.logprobs.as_ref().map(LogprobsView::from);
        assert_eq!(fast.logprobs, expected);
        assert_eq!(
            (&fast.key, &fast.answer.text),
            (&record.key, &record.answer.text)
        );
    }
    assert!(RecordView::from_line(b"{}").is_err());
}
