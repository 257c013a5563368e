//! Makes a cache like that of a run, and measures its preparation; see `tests/bench/prepare.sh`.
//!
//! | command | effect |
//! |---|---|
//! | `prepare make DIR RECORDS` | makes a student's tokenizer and a cache of RECORDS answers of 300 tokens with top-20 logprobs |
//! | `prepare run DIR` | prepares the cache of the run folder DIR, or maps earlier examples; prints time and memory as JSON |
//! | `prepare align DIR` | prints the number of teacher tokens that one core aligns per second |

#[path = "records.rs"]
mod records;

use std::path::Path;
use std::time::Instant;

use distill::cache::logprobs_view::LogprobsView;
use distill::cache::record::{Logprobs, Record};
use distill::cache::writer::{Cache, EncodedRecord};
use distill::config::{self, Compression, Config, Durability};
use distill::data::align::Mapper;
use distill::data::dataset;
use distill::data::groups::Selection;
use distill::tokenizer::Tokenizer;
use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerImpl};

/// Size of the student's vocabulary, about that of SmolLM2.
const VOCABULARY: usize = 49_152;
/// Approximate number of tokens in an answer.
const TOKENS: usize = 300;
const K: usize = 20;

fn main() -> anyhow::Result<()> {
    // The program does the same at its start.
    distill::ops::process::configure();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["make", dir, records] => make(Path::new(dir), records.parse()?),
        ["run", dir] => run(Path::new(dir)),
        ["align", dir] => align(Path::new(dir)),
        _ => anyhow::bail!("usage: prepare make DIR RECORDS | prepare run DIR | prepare align DIR"),
    }
}

fn make(dir: &Path, records: u64) -> anyhow::Result<()> {
    let mut random = fastrand::Rng::with_seed(1);
    let words = words(&mut random);
    make_tokenizer(&dir.join("student"), &words)?;
    let teacher = Teacher {
        tokenizer: Tokenizer::load(&dir.join("student"))?,
        words,
    };
    let settings = config::CacheConfig {
        durability: Durability::None,
        compression: Compression::None,
    };
    let cache = Cache::open(&dir.join("cache"), &settings)?;
    for first in (0..records).step_by(64) {
        let group: Vec<EncodedRecord> = (first..records.min(first + 64))
            .map(|n| EncodedRecord::new(&teacher.record(n, &mut random)?))
            .collect::<anyhow::Result<_>>()?;
        cache.append_group(&group)?;
    }
    Ok(())
}

/// Words of an invented language, by descending frequency.
fn words(random: &mut fastrand::Rng) -> Vec<String> {
    let onsets = [
        "b", "br", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "st", "t", "v", "",
    ];
    let vowels = ["a", "e", "i", "o", "u", "ai", "ea", "é", "oo", "y"];
    let codas = ["", "", "n", "r", "s", "t", "l", "nd", "ng", "ck"];
    let mut syllable = || {
        let onset = onsets[random.usize(..onsets.len())];
        let vowel = vowels[random.usize(..vowels.len())];
        [onset, vowel, codas[random.usize(..codas.len())]].concat()
    };
    (0..60_000)
        .map(|rank| (0..1 + rank % 4).map(|_| syllable()).collect())
        .collect()
}

/// Returns a random rank below `ranks`, with a Zipf distribution like the words of a text.
fn zipf(random: &mut fastrand::Rng, ranks: usize) -> usize {
    let rank = (ranks as f64).powf(random.f64()) as usize;
    rank.min(ranks) - 1
}

/// Trains a byte-level BPE tokenizer on the words, and saves it with a chat template.
fn make_tokenizer(dir: &Path, words: &[String]) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir)?;
    let mut trainer = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
                .map(|name| AddedToken::from(name, true))
                .to_vec(),
        )
        .build();
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer: TokenizerImpl<
        BPE,
        tokenizers::NormalizerWrapper,
        ByteLevel,
        ByteLevel,
        ByteLevel,
    > = TokenizerImpl::new(BPE::default());
    tokenizer
        .with_pre_tokenizer(Some(byte_level))
        .with_decoder(Some(byte_level));
    let texts = words.iter().enumerate().map(|(rank, word)| {
        let times = 1 + 200 / (rank + 1);
        format!(" {word}").repeat(times)
    });
    tokenizer
        .train(&mut trainer, texts)
        .map_err(anyhow::Error::msg)?;
    tokenizer
        .save(dir.join("tokenizer.json"), false)
        .map_err(anyhow::Error::msg)?;
    let template = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n\
        {{ message['content'] }}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let config = json!({"eos_token": "<|im_end|>", "chat_template": template});
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string())?;
    Ok(())
}

/// A teacher with the student's tokenizer. Every position gets soft labels, so the preparation has the most work.
struct Teacher {
    tokenizer: Tokenizer,
    words: Vec<String>,
}

impl Teacher {
    fn text(
        &self,
        tokens: usize,
        random: &mut fastrand::Rng,
    ) -> anyhow::Result<(String, Vec<u32>)> {
        let mut text = String::new();
        loop {
            for _ in 0..tokens.div_ceil(16) {
                let end = ["", "", "", "", "", "", ",", "."][random.usize(..8)];
                let paragraph = if random.usize(..40) == 0 { ".\n\n" } else { "" };
                let word = &self.words[zipf(random, self.words.len())];
                text += &format!("{end}{paragraph} {word}");
            }
            let text = text.trim();
            let ids = self.tokenizer.encode_text(text)?;
            if ids.len() >= tokens {
                return Ok((text.to_owned(), ids));
            }
        }
    }

    fn record(&self, n: u64, random: &mut fastrand::Rng) -> anyhow::Result<Record> {
        let (answer, ids) = self.text(TOKENS - 8, random)?;
        let question = self.text(50, random)?.0;
        let logprobs = self.logprobs(&ids, random);
        let tokens = ids.len() as u64;
        Ok(records::record(n, question, answer, tokens, Some(logprobs)))
    }

    fn token(&self, id: u32) -> String {
        let bytes = self.tokenizer.token_bytes(id).unwrap_or_default();
        String::from_utf8(bytes.to_vec()).unwrap_or_default()
    }

    fn logprobs(&self, ids: &[u32], random: &mut fastrand::Rng) -> Logprobs {
        let mut logprobs = Logprobs::default();
        for &id in ids {
            let mut left = 0.999f32;
            let own = zipf(random, K);
            let mut top = Vec::new();
            let mut top_logprob = Vec::new();
            for rank in 0..K {
                // The first 300 tokens include the control tokens and the single bytes.
                let other = 300 + zipf(random, VOCABULARY - 300) as u32;
                let mass = left * (0.3 + 0.6 * random.f32());
                left -= mass;
                top.push(self.token(if rank == own { id } else { other }));
                top_logprob.push(mass.ln());
            }
            top_logprob.sort_by(|a, b| b.total_cmp(a));
            let top_logprob: Vec<Option<f32>> = top_logprob.into_iter().map(Some).collect();
            logprobs.token.push(self.token(id));
            logprobs.logprob.push(top_logprob[own]);
            logprobs.top.push(top);
            logprobs.top_logprob.push(top_logprob);
        }
        logprobs
    }
}

fn run(dir: &Path) -> anyhow::Result<()> {
    let mut config = Config {
        run_dir: dir.to_owned(),
        ..Config::default()
    };
    config.student.path = dir.join("student");
    let tokenizer = Tokenizer::load(&config.student.path)?;
    let started = Instant::now();
    let data = dataset::load(
        &config.data,
        &config.run_dir,
        &Selection::All,
        &tokenizer,
        &mut |_, _| Ok(()),
    )?;
    let seconds = started.elapsed().as_secs_f64();
    let report = &data.report;
    println!(
        "{}",
        json!({
            "is_new": data.is_new, "seconds": seconds, "cpu": cpu_seconds(), "peak_mib": peak_mib(),
            "records": report.records, "kept": report.kept, "tokens": report.tokens,
            "positions": report.positions, "soft_positions": report.soft_positions,
            "mapped_mass": report.mean_mapped_mass,
        })
    );
    Ok(())
}

/// Aligns the same answers repeatedly on one thread.
fn align(dir: &Path) -> anyhow::Result<()> {
    let mut random = fastrand::Rng::with_seed(2);
    let teacher = Teacher {
        tokenizer: Tokenizer::load(&dir.join("student"))?,
        words: words(&mut fastrand::Rng::with_seed(1)),
    };
    let answers: Vec<(String, Vec<u32>, Logprobs)> = (0..100)
        .map(|_| {
            let (text, ids) = teacher.text(TOKENS - 8, &mut random)?;
            let logprobs = teacher.logprobs(&ids, &mut random);
            Ok((text, ids, logprobs))
        })
        .collect::<anyhow::Result<_>>()?;
    let views: Vec<LogprobsView> = answers.iter().map(|a| (&a.2).into()).collect();
    let mut mapper = Mapper::new(&teacher.tokenizer, None);
    let mut tokens = 0;
    let mut soft = 0;
    let mut started = Instant::now();
    for round in 0..=20 {
        if round == 1 {
            // The first round has filled the caches.
            tokens = 0;
            soft = 0;
            started = Instant::now();
        }
        for ((text, ids, _), view) in answers.iter().zip(&views) {
            let aligned =
                mapper.align(view, text.as_bytes(), 0..text.len(), ids[..].into(), None)?;
            tokens += ids.len();
            soft += (0..ids.len())
                .filter(|&at| !aligned.soft(at).0.is_empty())
                .count();
        }
    }
    let speed = tokens as f64 / started.elapsed().as_secs_f64();
    println!(
        "{}",
        json!({"tokens_per_s": speed, "tokens": tokens, "soft": soft})
    );
    Ok(())
}

/// Returns the CPU time of all threads of this process in seconds, if the system reports it. Other load does not change
/// it.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    // The unit is the same on all machines (USER_HZ).
    Some(ticks as f64 / 100.0)
}

/// Returns the peak memory of this process in MiB, if the system reports it.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024)
}
