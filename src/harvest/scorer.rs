//! What an endpoint says of texts that a student wrote, asked for while the student trains.
//!
//! Judgements are paid for like answers, so they go the same way: through the limits, the retries and
//! the budget of the run, into a cache of their own ([`Config::judged_dir`]). A run that was killed and
//! resumed writes the same texts again, and buys none of them twice.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tokio::runtime::Runtime;

use crate::cache;
use crate::cache::lookup::Lookup;
use crate::cache::question::{CacheKeys, KeyEndpoint, Question};
use crate::cache::writer::Cache;
use crate::client::http::HttpTeacher;
use crate::client::request;
use crate::client::request::RequestTemplate;
use crate::client::score_text::ScoringMethod;
use crate::client::transport::Transport;
use crate::clock::WallClock;
use crate::config;
use crate::config::{Assignment, Compression, Config, PromptOrder, ScoredBy};
use crate::exit::Exit;
use crate::harvest::dispatch::Dispatcher;
use crate::harvest::dispatch::ending::DispatchEnd;
use crate::harvest::run_files::RunFiles;
use crate::harvest::upstream::Upstream;
use crate::plan::unanswered::Unanswered;
use crate::plan::{Plan, PlanScope, RowStatus};
use crate::probe::findings;
use crate::probe::findings::Finding;
use crate::prompt::Prompt;
use crate::rate_limit::redis::SharedLimits;
use crate::report::summary::HarvestSummary;
use crate::signal::StopFlag;
use crate::terminal::progress::Progress;
use crate::tokenizer::Tokenizer;

/// An endpoint, ready to judge.
pub struct TextScorer {
    /// Its `run_dir` is the folder of the judgements.
    config: Config,
    upstream: config::EndpointConfig,
    scoring: Arc<ScoringMethod>,
    transport: Arc<dyn Transport>,
    runtime: Runtime,
    cache: Cache,
    judged: Lookup,
    /// Between two calls; the upstream only once there has been one.
    books: Option<RunFiles>,
    limits: Option<Upstream>,
    told: ScoringStats,
    quiet: bool,
    /// Held so that no harvest keeps the same books meanwhile.
    _harvest: Cache,
}

/// What judging has come to.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ScoringStats {
    /// Texts that were to be judged.
    pub texts: u64,
    /// Of these, judged before, by a part of the run that was stopped.
    pub cached: u64,
    /// Refused, or failed for good.
    pub failed: u64,
    /// Judged, but of no use: the teacher's tokens do not spell the text.
    pub unusable: u64,
    /// Sent, retries included.
    pub requests: u64,
    pub prompt_tokens: u64,
    /// By their usage; none without prices.
    pub cost_usd: Option<f64>,
}

impl TextScorer {
    /// The judge that the config names; None where that is a model on this machine, or none is needed.
    /// Unless it is `quiet` it tells of long waits.
    ///
    /// # Errors
    /// Where a setting, the key or the tokenizer's folder is missing ([`Exit::Usage`]), or the cache of
    /// the judgements cannot be opened.
    pub fn new(config: &Config, quiet: bool) -> Result<Option<TextScorer>> {
        let dialect = config.on_policy.judge;
        if !config.train.on_policy || dialect == ScoredBy::Local {
            return Ok(None);
        }
        request::check(config)?;
        let clock = WallClock::system();
        crate::plan::prepare::check_money(config, None, clock.now())?;
        let Some(mut upstream) = config.endpoints().pop() else {
            return Ok(None);
        };
        // Of no use, but no endpoint takes less.
        upstream.sampling.max_tokens = 1;
        if dialect == ScoredBy::PromptLogprobs {
            check_endpoint(&upstream, &config.run_dir)?;
        }
        let tokenizer = config.on_policy.tokenizer.as_deref();
        let tokenizer = tokenizer.map(|dir| {
            let mut tokenizer = Tokenizer::load(dir)
                .with_context(|| format!("cannot load on_policy.tokenizer {}", dir.display()))?;
            if let Some(date) = config.student.template_date {
                tokenizer.set_date(date.into());
            }
            anyhow::Ok(tokenizer)
        });
        let (path, scoring) = match (dialect, tokenizer.transpose()?) {
            (ScoredBy::Echo, Some(tokenizer)) => ("completions", ScoringMethod::Echo(tokenizer)),
            (ScoredBy::Echo, None) => bail!(Exit::Usage("set on_policy.tokenizer".into())),
            (_, tokenizer) => ("chat/completions", ScoringMethod::PromptLogprobs(tokenizer)),
        };
        let transport = Arc::new(HttpTeacher::at(&upstream.teacher, path)?);
        let within = Config {
            run_dir: config.judged_dir(),
            cache: config::CacheConfig {
                // Its lines are found by where they are; and what is trained on stays as it is.
                compression: Compression::None,
                ..config.cache.clone()
            },
            ..config.clone()
        };
        let harvest = Cache::open(&config.own_cache(), &within.cache)?;
        let cache = Cache::open(&within.own_cache(), &within.cache)?;
        let judged = Lookup::open(&within.own_cache())?;
        // The books are those of the run: one budget for all that it buys.
        let spent = harvest.cost_when_opened() + judged.cost_usd();
        let unanswered = Unanswered::load(&config.judged_dir())?;
        let (books, lost) = RunFiles::open(config, spent, unanswered, clock)?;
        lost.warn();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("cannot start the async runtime")?;
        Ok(Some(TextScorer {
            config: within,
            upstream,
            scoring: Arc::new(scoring),
            transport,
            runtime,
            cache,
            judged,
            books: Some(books),
            limits: None,
            told: ScoringStats::default(),
            quiet,
            _harvest: harvest,
        }))
    }

    /// What it has come to so far.
    pub fn stats(&self) -> &ScoringStats {
        &self.told
    }

    /// The records of these texts, in order: conversations whose last message is to be judged. None where
    /// the endpoint refuses one, or fails at it for good.
    ///
    /// # Errors
    /// Where a harvest would stop: no money left, an outage, a signal of `stop`; and where nothing that it
    /// was asked so far could be used.
    pub fn judge(&mut self, texts: Vec<Prompt>, stop: &StopFlag) -> Result<Vec<Option<Vec<u8>>>> {
        let asking = self.request_template();
        let teacher = &self.upstream.teacher;
        let endpoint = KeyEndpoint::new(&teacher.name, crate::config::teacher::identity(teacher));
        let past = self.cache.past();
        let names = |text: &Prompt| match self.scoring.check(&text.messages) {
            Ok(()) => {
                let body = asking.body(&text.messages, 0);
                let question = Question::new(&body, 0);
                let old = past.has_schema_1.then_some((&body, 0));
                Some(CacheKeys::new(&question, &endpoint, old))
            }
            Err(error) => {
                tracing::warn!("{} cannot be judged: {error:#}", text.id);
                None
            }
        };
        let keys: Vec<Option<CacheKeys>> = texts.iter().map(names).collect();
        let mut is_asked = keys.iter().map(Option::is_some);
        let mut texts = texts;
        texts.retain(|_| is_asked.next().unwrap_or_default());
        let settings = config::PromptsConfig {
            samples: 1,
            order: PromptOrder::Source,
            teachers: Assignment::All,
            ..config::PromptsConfig::default()
        };
        let max_attempts = self.config.retry.max_attempts;
        let books = self.books.as_ref();
        let standing = |key: &str| match books {
            Some(books) => {
                let is_cached = self.cache.contains(key);
                Ok(books.unanswered.row_status(key, is_cached, max_attempts))
            }
            None => Ok(RowStatus::Open),
        };
        let plan = Plan::new(
            texts,
            vec![asking],
            &settings,
            PlanScope::default(),
            &past,
            standing,
        )?;
        self.told.texts += plan.total;
        self.told.cached += plan.cached - plan.repeated;
        if !plan.rows.is_empty() {
            self.ask(plan, stop)?;
            self.judged.refresh()?;
        }
        let mut lines = Vec::with_capacity(keys.len());
        for names in &keys {
            let mut line = None;
            for key in names.iter().flat_map(CacheKeys::iter) {
                if line.is_none() {
                    line = self.judged.line(key)?;
                }
            }
            lines.push(line);
        }
        Ok(lines)
    }

    fn request_template(&self) -> RequestTemplate {
        RequestTemplate {
            scoring: Some(Arc::clone(&self.scoring)),
            ..RequestTemplate::plain(self.upstream.clone())
        }
    }

    fn ask(&mut self, plan: Plan, stop: &StopFlag) -> Result<()> {
        let books = self.books.take();
        let mut books = books.context("internal error: the budget account is missing")?;
        books.check_largest(&plan, 0)?;
        let (limits, progress) = (self.limits.take(), Progress::notes(self.quiet));
        let (config, cache, upstream) = (&self.config, &self.cache, &self.upstream);
        let transport = Arc::clone(&self.transport);
        let ended = self.runtime.block_on(async {
            let wake = Arc::default();
            let limits = match limits {
                Some(mut limits) => {
                    limits.resume_with(&plan, 0)?;
                    limits
                }
                None => {
                    let patience = Duration::try_from_secs_f64(config.retry.max_outage_s)?;
                    let shared =
                        SharedLimits::connect(upstream, plan.largest(0), patience, &wake).await?;
                    let day = books.day(upstream);
                    Upstream::new(&plan, 0, transport, day, shared, config)?
                }
            };
            let (clock, plan) = (WallClock::system(), Arc::new(plan));
            let dispatcher =
                Dispatcher::new(config, plan, cache, vec![limits], books, clock, progress)?;
            dispatcher.with_waker(wake).run_to_end(stop.signals()).await
        })?;
        let DispatchEnd {
            summary,
            mut upstreams,
            books,
        } = ended;
        (self.books, self.limits) = (Some(books), upstreams.pop());
        self.count(summary)
    }

    fn count(&mut self, summary: HarvestSummary) -> Result<()> {
        let told = &mut self.told;
        told.failed += summary.failed;
        told.unusable += summary.without_logprobs;
        told.requests += summary.requests;
        told.prompt_tokens += summary.usage.prompt_tokens;
        told.cost_usd = summary.cost_usd;
        let refused = summary.failed_rows.first().map(|row| row.message.clone());
        match summary.error {
            // Some texts are judged less.
            Some(error) if matches!(error.downcast_ref(), Some(Exit::SomeFailed(_))) => {}
            Some(error) => return Err(error),
            None => {}
        }
        if told.failed + told.unusable < told.texts {
            return Ok(());
        }
        let why = refused.unwrap_or_else(|| {
            "its tokens do not spell what the student wrote. Set on_policy.tokenizer to the folder of the \
             teacher's tokenizer"
                .into()
        });
        Err(Exit::Usage(format!(
            "{} judges nothing: {why}",
            self.upstream.teacher.label()
        ))
        .into())
    }
}

/// Refuses an endpoint that `distill probe` found not to tell the logprobs of given texts.
fn check_endpoint(upstream: &config::EndpointConfig, run_dir: &Path) -> Result<()> {
    let known = findings::load(run_dir)?;
    let Some(found) = known.as_ref().and_then(|known| known.find(upstream)) else {
        return Ok(());
    };
    match found.prompt_logprobs {
        Finding::Works | Finding::Unknown => Ok(()),
        Finding::Ignored | Finding::Refused => Err(Exit::Usage(format!(
            "{} does not tell the logprobs of given texts by `prompt_logprobs` (by `distill probe` of {}; run \
             it again if the endpoint has changed): try on_policy.judge = \"echo\", or teacher.local",
            upstream.teacher.label(),
            found.probed_at
        ))
        .into()),
    }
}

/// What the judgements of the run in this folder cost, in US dollars.
///
/// # Errors
/// Where their cache cannot be read.
pub fn scoring_cost_usd(config: &Config) -> Result<f64> {
    let dir = config.judged_dir().join("cache");
    match cache::exists(&dir) {
        true => Ok(Lookup::open(&dir)?.cost_usd()),
        false => Ok(0.0),
    }
}
