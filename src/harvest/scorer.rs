//! Scores texts that a student wrote during on-policy training: requests the teacher's logprobs from an endpoint.
//!
//! Scoring requests cost money like answers, so they use the same rate limits, retries and budget. Their records are
//! in a separate cache ([`config::scores_dir`]). After a kill, the resumed training generates the same texts again and
//! reads their scores from this cache.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tokio::runtime::Runtime;
use tokio::sync::Notify;

use crate::cache;
use crate::cache::logprobs_view::LogprobsView;
use crate::cache::lookup::Lookup;
use crate::cache::question::{CacheKeys, KeyEndpoint, Question};
use crate::cache::view::RecordView;
use crate::cache::writer::Cache;
use crate::client::http::HttpTeacher;
use crate::client::request::RequestTemplate;
use crate::client::score_text::ScoringMethod;
use crate::client::transport::Transport;
use crate::clock::WallClock;
use crate::config;
use crate::config::{Assignment, Compression, Config, PromptOrder, ScoredBy};
use crate::data::text_scorer::TextScorer;
use crate::exit::Exit;
use crate::harvest::batch::journal;
use crate::harvest::dispatch::Dispatcher;
use crate::harvest::dispatch::ending::DispatchEnd;
use crate::harvest::run_files::RunFiles;
use crate::harvest::upstream::Upstream;
use crate::plan::run_settings::RunSettings;
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

/// Scores texts through an endpoint.
pub struct EndpointScorer {
    /// Settings of a run whose folder is [`config::scores_dir`].
    settings: RunSettings,
    endpoint: config::EndpointConfig,
    scoring: Arc<ScoringMethod>,
    transport: Arc<dyn Transport>,
    runtime: Runtime,
    cache: Cache,
    /// Index of the records in `cache`.
    lookup: Lookup,
    /// None while a call is running, and after a call that ended without a summary.
    run_files: Option<RunFiles>,
    /// State of the endpoint and its rate limits between calls. None before the first call, while a call is running,
    /// and after a call that ended without a summary.
    upstream: Option<Upstream>,
    /// Notified when a shared limit has an event. It stays the same in all calls, because the limits keep it.
    wake: Arc<Notify>,
    stats: ScoringStats,
    quiet: bool,
    /// Cache of the harvest. It stays open, and so locked, so that no harvest uses the same budget account meanwhile.
    _harvest_cache: Cache,
}

/// Counts and cost of scoring.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ScoringStats {
    /// Number of texts to score, not counting those that the scoring method cannot request.
    pub texts: u64,
    /// Number of texts found in the cache of scores.
    pub cached: u64,
    /// Number of texts that were refused or failed.
    pub failed: u64,
    /// Number of texts whose scores are unusable, for example because the teacher's tokens do not spell the text.
    pub unusable: u64,
    /// Number of requests sent, including retries.
    pub requests: u64,
    /// Number of prompt tokens in the reported usage.
    pub prompt_tokens: u64,
    /// Cost in US dollars computed from the reported usage; None without prices.
    pub cost_usd: Option<f64>,
}

impl EndpointScorer {
    /// Opens the scorer of the config. None if a local model scores, or training is not on-policy. `quiet`
    /// suppresses the notes of the requests, for example about long waits.
    ///
    /// # Errors
    /// If a setting, the key or the tokenizer's folder is missing ([`Exit::Usage`]), or the cache of scores cannot be
    /// opened.
    pub fn new(config: &Config, quiet: bool) -> Result<Option<EndpointScorer>> {
        let method = config.on_policy.judge;
        if !config.train.on_policy || method == ScoredBy::Local {
            return Ok(None);
        }
        let harvest_settings = RunSettings::new(config)?;
        let clock = WallClock::system();
        crate::plan::prepare::check_money(&harvest_settings, None, clock.now())?;
        let Some(mut endpoint) = harvest_settings.endpoints.last().cloned() else {
            return Ok(None);
        };
        // The completion is not used, but endpoints require at least 1 token.
        endpoint.sampling.max_tokens = 1;
        if method == ScoredBy::PromptLogprobs {
            check_endpoint(&endpoint, &config.run_dir)?;
        }
        let tokenizer = config.on_policy.tokenizer.as_deref();
        let tokenizer = tokenizer.map(|dir| {
            let mut tokenizer = Tokenizer::load(dir)
                .with_context(|| format!("cannot load on_policy.tokenizer {}", dir.display()))?;
            if let Some(date) = config.student.template_date {
                tokenizer.set_date(date.into());
            }
            if tokenizer.is_encoder_decoder() {
                bail!(Exit::Usage(format!(
                    "`on_policy.tokenizer` {} is of an encoder-decoder, which cannot score a given text over an API: set \
                     `teacher.local` to the folder of the model, and `on_policy.judge` = \"local\"",
                    dir.display()
                )));
            }
            anyhow::Ok(tokenizer)
        });
        let (path, scoring) = match (method, tokenizer.transpose()?) {
            (ScoredBy::Echo, Some(tokenizer)) => ("completions", ScoringMethod::Echo(tokenizer)),
            (ScoredBy::Echo, None) => bail!(Exit::Usage(
                "set `on_policy.tokenizer` to the folder of the teacher's tokenizer".into()
            )),
            (_, tokenizer) => ("chat/completions", ScoringMethod::PromptLogprobs(tokenizer)),
        };
        let transport = Arc::new(HttpTeacher::with_path(&endpoint.teacher, path)?);
        let cache_settings = config::CacheConfig {
            // `Lookup` finds lines by their byte offset, which compression would change.
            compression: Compression::None,
            ..config.cache.clone()
        };
        let settings =
            harvest_settings.in_folder(config::scores_dir(&config.run_dir), cache_settings);
        let harvest_cache = Cache::open(&harvest_settings.cache_dir, &settings.cache)?;
        let cache = Cache::open(&settings.cache_dir, &settings.cache)?;
        let lookup = Lookup::open(&settings.cache_dir)?;
        // Harvest and scoring share one budget account.
        let cached_usd = harvest_cache.cost_when_opened() + lookup.cost_usd();
        let unanswered = Unanswered::load(&settings.run_dir)?;
        let (mut run_files, left_in_flight) =
            RunFiles::open(&harvest_settings, cached_usd, unanswered, clock)?;
        left_in_flight.warn();
        run_files.hold_for_batches(journal::reserved_usd(&harvest_settings.run_dir)?);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("cannot start the async runtime")?;
        Ok(Some(EndpointScorer {
            settings,
            endpoint,
            scoring: Arc::new(scoring),
            transport,
            runtime,
            cache,
            lookup,
            run_files: Some(run_files),
            upstream: None,
            wake: Arc::default(),
            stats: ScoringStats::default(),
            quiet,
            _harvest_cache: harvest_cache,
        }))
    }

    /// Returns the counts and the cost so far.
    pub fn stats(&self) -> &ScoringStats {
        &self.stats
    }

    /// Reads the logprobs of a text from the cache of scores.
    fn logprobs(&self, keys: &CacheKeys) -> Result<Option<LogprobsView<'static>>> {
        for key in keys.iter() {
            if let Some(line) = self.lookup.line(key)? {
                let record = RecordView::from_line(&line)?;
                return Ok(record.logprobs.map(LogprobsView::into_owned));
            }
        }
        Ok(None)
    }

    fn request_template(&self) -> RequestTemplate {
        RequestTemplate {
            scoring: Some(Arc::clone(&self.scoring)),
            ..RequestTemplate::plain(self.endpoint.clone())
        }
    }

    /// Sends the requests of a plan and waits for their replies.
    fn send(&mut self, plan: Plan, stop: &StopFlag) -> Result<()> {
        let run_files = self.run_files.take();
        let mut run_files = run_files.context("internal error: the budget account is missing")?;
        run_files.check_largest(&plan, 0)?;
        let upstream = self.upstream.take();
        let progress = Progress::notes(self.quiet);
        let settings = &self.settings;
        let cache = &self.cache;
        let endpoint = &self.endpoint;
        let transport = Arc::clone(&self.transport);
        let wake = Arc::clone(&self.wake);
        let ended = self.runtime.block_on(async {
            let upstream = match upstream {
                Some(mut upstream) => {
                    upstream.resume_with(&plan, 0)?;
                    upstream
                }
                None => {
                    let max_outage = settings.retry.max_outage;
                    let largest = plan.largest(0);
                    let shared =
                        SharedLimits::connect(endpoint, largest, max_outage, &wake).await?;
                    let daily_limit = run_files.daily_limit(endpoint);
                    Upstream::new(&plan, 0, transport, daily_limit, shared, settings)?
                }
            };
            let clock = WallClock::system();
            let plan = Arc::new(plan);
            let dispatcher = Dispatcher::new(
                settings,
                plan,
                cache,
                vec![upstream],
                run_files,
                clock,
                progress,
            )?;
            dispatcher.with_waker(wake).run_to_end(stop.signals()).await
        })?;
        let DispatchEnd {
            summary,
            mut upstreams,
            run_files,
        } = ended;
        self.run_files = Some(run_files);
        self.upstream = upstreams.pop();
        self.add_to_stats(summary)
    }

    /// Adds the counts of a call to the statistics.
    ///
    /// # Errors
    /// If the requests stopped early, or no text so far has usable scores.
    fn add_to_stats(&mut self, summary: HarvestSummary) -> Result<()> {
        let stats = &mut self.stats;
        stats.failed += summary.failed;
        stats.unusable += summary.without_logprobs;
        stats.requests += summary.requests;
        stats.prompt_tokens += summary.usage.prompt_tokens;
        stats.cost_usd = summary.cost_usd;
        let first_failure = summary.failed_rows.first().map(|row| row.message.clone());
        match summary.error {
            // Training continues without the texts that failed.
            Some(error) if matches!(error.downcast_ref(), Some(Exit::SomeFailed(_))) => {}
            Some(error) => return Err(error),
            None => {}
        }
        if stats.failed + stats.unusable < stats.texts {
            return Ok(());
        }
        let reason = first_failure.unwrap_or_else(|| {
            "its tokens do not spell the student's text; set `on_policy.tokenizer` to the folder of the \
             teacher's tokenizer"
                .into()
        });
        Err(Exit::Usage(format!(
            "{} scored none of the texts: {reason}",
            self.endpoint.teacher.label()
        ))
        .into())
    }
}

impl TextScorer for EndpointScorer {
    /// Scores the last message of each conversation in `texts`. Returns None for a text without usable scores.
    ///
    /// # Errors
    /// If the requests stop early (budget used up, outage, signal of `stop`), or every text so far has failed or has
    /// unusable scores.
    fn score(
        &mut self,
        texts: Vec<Prompt>,
        stop: &StopFlag,
    ) -> Result<Vec<Option<LogprobsView<'static>>>> {
        let template = self.request_template();
        let teacher = &self.endpoint.teacher;
        let key_endpoint =
            KeyEndpoint::new(&teacher.name, crate::config::teacher::identity(teacher));
        let key_variants = self.cache.key_variants();
        let cache_keys = |text: &Prompt| match self.scoring.check(&text.messages) {
            Ok(()) => {
                let body = template.body(&text.messages, 0);
                let question = Question::new(&body, 0);
                let with_schema_1 = key_variants.has_schema_1.then_some((&body, 0));
                Some(CacheKeys::new(&question, &key_endpoint, with_schema_1))
            }
            Err(error) => {
                tracing::warn!("{} cannot be scored: {error:#}", text.id);
                None
            }
        };
        let keys: Vec<Option<CacheKeys>> = texts.iter().map(cache_keys).collect();
        let texts_and_keys = texts.into_iter().zip(&keys);
        let scorable = texts_and_keys.filter_map(|(text, keys)| keys.as_ref().map(|_| text));
        let texts: Vec<Prompt> = scorable.collect();
        let settings = config::PromptsConfig {
            samples: 1,
            order: PromptOrder::Source,
            teachers: Assignment::All,
            ..config::PromptsConfig::default()
        };
        let max_attempts = self.settings.retry.max_attempts;
        let run_files = self.run_files.as_ref();
        let row_status = |key: &str| match run_files {
            Some(run_files) => {
                let is_cached = self.cache.contains(key);
                Ok(run_files
                    .unanswered
                    .row_status(key, is_cached, max_attempts))
            }
            None => Ok(RowStatus::Open),
        };
        let plan = Plan::new(
            texts,
            vec![template],
            &settings,
            PlanScope::default(),
            &key_variants,
            row_status,
        )?;
        self.stats.texts += plan.total;
        self.stats.cached += plan.cached - plan.repeated;
        if !plan.rows.is_empty() {
            self.send(plan, stop)?;
            self.lookup.refresh()?;
        }
        let logprobs = keys.iter().map(|keys| match keys {
            Some(keys) => self.logprobs(keys),
            None => Ok(None),
        });
        logprobs.collect()
    }
}

/// Checks that `distill probe`, if it was run, did not find that the endpoint ignores or refuses `prompt_logprobs`.
fn check_endpoint(endpoint: &config::EndpointConfig, run_dir: &Path) -> Result<()> {
    let findings = findings::load(run_dir)?;
    let Some(probed) = findings
        .as_ref()
        .and_then(|findings| findings.find(endpoint))
    else {
        return Ok(());
    };
    match probed.prompt_logprobs {
        Finding::Works | Finding::Unknown => Ok(()),
        Finding::Ignored | Finding::Refused => Err(Exit::Usage(format!(
            "{} does not support `prompt_logprobs` (found by `distill probe` on {}; rerun it if the endpoint \
             has changed): try `on_policy.judge = \"echo\"` or `teacher.local`",
            endpoint.teacher.label(),
            probed.probed_at
        ))
        .into()),
    }
}

/// Returns the cost of all scoring requests of the run folder, in US dollars.
///
/// # Errors
/// If the cache of scores cannot be read.
pub(crate) fn scoring_cost_usd(run_dir: &Path) -> Result<f64> {
    let dir = config::cache_dir(&config::scores_dir(run_dir));
    if cache::exists(&dir) {
        Ok(Lookup::open(&dir)?.cost_usd())
    } else {
        Ok(0.0)
    }
}
