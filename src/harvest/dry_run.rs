//! `harvest --dry-run`: estimates requests and cost, and makes the checks of a run, except that of the shared limits.
//! Sends nothing, writes nothing.

use std::path::Path;

use anyhow::Result;
use tokio::time::Instant;

use crate::budget::account::Account;
use crate::budget::dollars::Dollars;
use crate::budget::ledger::LedgerStore;
use crate::cache;
use crate::client::http::HttpTeacher;
use crate::config::{RequestMode, ScheduleConfig, StudentConfig, StudentInit};
use crate::exit::Exit;
use crate::harvest::options::HarvestOptions;
use crate::harvest::window::{RequestWindow, WindowState};
use crate::harvest::{run_files, scorer};
use crate::plan::again;
use crate::plan::estimate::Estimate;
use crate::plan::prepare::{
    check_endpoints, check_fits, check_money, prompts, request_templates, sample_stats,
    unused_answers,
};
use crate::plan::run_settings::RunSettings;
use crate::plan::unanswered::Unanswered;
use crate::plan::{Plan, PlanScope};
use crate::report::summary::HarvestSummary;
use crate::signal::StopFlag;
use crate::terminal::format_dollars;

/// Returns a summary with the estimate and the warnings.
///
/// # Errors
/// The first check that fails.
pub(crate) fn run(settings: RunSettings, options: &HarvestOptions) -> Result<HarvestSummary> {
    check(&settings, options)?;
    let is_batch = settings.schedule.mode == RequestMode::Batch;
    let settings = &if is_batch {
        settings.at_batch_prices()
    } else {
        settings
    };
    let prompts = prompts(&settings.prompts, options.limit, &StopFlag::default())?;
    let dir = &settings.cache_dir;
    let cached = crate::cache::open::peek(dir)?;
    let stats = sample_stats(dir)?;
    let probes = check_endpoints(&settings.run_dir, &settings.endpoints)?;
    let templates = request_templates(&settings.endpoints, &probes)?;
    let unanswered = Unanswered::load(&settings.run_dir)?;
    let mut key_variants = cached.key_variants.clone();
    key_variants.has_schema_1 |=
        crate::harvest::batch::journal::is_under_way(&settings.run_dir)? || !unanswered.is_empty();
    let max_attempts = settings.retry.max_attempts;
    let row_status = |key: &str| Ok(unanswered.row_status(key, cached.contains(key), max_attempts));
    let plan = if options.again.is_empty() {
        let scope = PlanScope {
            shard: options.shard,
            only: None,
        };
        Plan::new(
            prompts,
            templates,
            &settings.prompts,
            scope,
            &key_variants,
            row_status,
        )?
    } else {
        again::select(
            settings,
            &options.again,
            options.shard,
            &prompts,
            &unanswered,
        )?
        .plan
    };
    for upstream in 0..plan.rows_by_endpoint.len() {
        check_fits(settings.budget_usd, &plan, upstream)?;
    }
    let mut estimate = Estimate::new(&plan, &stats, cached.bytes_per_record());
    if is_batch {
        estimate.minutes = 0.0;
        estimate.batches = Some(crate::harvest::batch::estimate::estimate_batches(
            settings, &plan,
        )?);
    }
    if options.again.is_empty() {
        estimate.cached = unused_answers(dir, &plan, cached.len(), &StopFlag::default())?;
    }
    estimate.first_request = first_request(&plan);
    let mut summary = HarvestSummary {
        pending: plan.rows.len() as u64,
        estimate: Some(estimate),
        arguments: settings.arguments.clone(),
        ..HarvestSummary::from_plan(&plan, &unanswered)
    };
    summary.warnings.extend(plan.repeats_warning());
    let cached_usd = cached.cost_usd + scorer::scoring_cost_usd(&settings.run_dir)?;
    let account = run_files::open_read_only(settings, cached_usd)?;
    add_budget_warnings(&mut summary, &plan, &account);
    add_wait_warnings(&mut summary, &settings.schedule, &plan, account)?;
    Ok(summary)
}

/// Adds the budget and the amount spent, and a warning if the remaining budget may end the run early.
fn add_budget_warnings<S: LedgerStore>(
    summary: &mut HarvestSummary,
    plan: &Plan,
    account: &Account<S>,
) {
    let Some(cap) = account.cap() else { return };
    summary.budget_usd = Some(cap.usd());
    summary.run_folder_usd = Some(account.spent().total().usd());
    let estimate = summary.estimate.as_ref();
    let max_cost_usd = estimate.and_then(|estimate| Some(estimate.cost_usd?.1));
    let remaining = account.remaining();
    let remaining_text = format_dollars(remaining.usd());
    let smallest = smallest_reservation(plan, account);
    if let Some(smallest) = smallest.filter(|smallest| *smallest > remaining) {
        summary.warnings.push(format!(
            "{remaining_text} of the budget remain, but a request reserves {}: nothing would be sent; \
             raise `budget.usd`",
            format_dollars(smallest.usd())
        ));
    } else if let Some(max_cost_usd) = max_cost_usd.filter(|max| *max > remaining.usd()) {
        summary.warnings.push(format!(
            "{remaining_text} of the budget remain, but the pending rows may cost {}: the run may stop early",
            format_dollars(max_cost_usd)
        ));
    }
}

/// Returns the smallest reservation of a row, which is 0 for a row without a price. None if the plan has no rows.
fn smallest_reservation<S: LedgerStore>(plan: &Plan, account: &Account<S>) -> Option<Dollars> {
    let upstreams = plan
        .rows_by_endpoint
        .iter()
        .zip(&plan.templates)
        .enumerate();
    let rows = upstreams.flat_map(|(upstream, (rows, template))| {
        let reservation = move |row| {
            account
                .bound(&plan.bound(upstream, row), &template.endpoint.price)
                .usd
        };
        rows.clone().map(reservation)
    });
    rows.min()
}

/// Adds a warning for each reason why a run started now would wait before its first request.
fn add_wait_warnings<S: LedgerStore>(
    summary: &mut HarvestSummary,
    schedule: &ScheduleConfig,
    plan: &Plan,
    mut account: Account<S>,
) -> Result<()> {
    let now = jiff::Timestamp::now();
    let window = RequestWindow::new(schedule, now)?;
    if let WindowState::Closed(until) = window.state(now) {
        summary.warnings.push(format!(
            "outside the window: a run started now waits until {}",
            window.show(until)
        ));
    }
    if schedule.mode == RequestMode::Batch {
        return Ok(());
    }
    for (template, rows) in plan.templates.iter().zip(&plan.rows_by_endpoint) {
        if rows.is_empty() {
            continue;
        }
        let checked_at = Instant::now();
        let mut daily_limit = run_files::daily_limit(&mut account, &template.endpoint, now);
        if let Err(until) = daily_limit.check(checked_at) {
            let until = now.checked_add(until - checked_at).unwrap_or(now);
            summary.warnings.push(format!(
                "`limits.requests_per_day` of {} is used up: a run started now waits until {}",
                template.endpoint.teacher.label(),
                window.show(until)
            ));
        }
    }
    Ok(())
}

/// Makes the checks that need no plan.
fn check(settings: &RunSettings, options: &HarvestOptions) -> Result<()> {
    for upstream in &settings.endpoints {
        HttpTeacher::new(&upstream.teacher)?;
    }
    let now = jiff::Timestamp::now();
    RequestWindow::new(&settings.schedule, now)?.check_not_over(now)?;
    if settings.run_dir.exists() && !settings.run_dir.is_dir() {
        let message = format!("`run_dir` = {} is a file", settings.run_dir.display());
        return Err(Exit::Usage(message).into());
    }
    check_money(settings, options.shard, now)?;
    if settings.schedule.mode == RequestMode::Realtime {
        crate::harvest::batch::journal::check_none_under_way(&settings.run_dir)?;
    }
    cache::open_file::check_nothing_displaced(&settings.cache_dir)
}

/// Checks that the folder of the student, if one is configured, has the files that training needs.
///
/// # Errors
/// [`Exit::Usage`] with the first missing file.
pub(crate) fn check_student(student: &StudentConfig, config_file: Option<&Path>) -> Result<()> {
    let folder = config_file.and_then(Path::parent);
    let default_student = StudentConfig {
        path: folder
            .unwrap_or(Path::new(""))
            .join(StudentConfig::default().path),
        ..StudentConfig::default()
    };
    if *student == default_student {
        return Ok(());
    }
    let mut files = vec!["tokenizer.json"];
    if student.init != StudentInit::Random {
        files.push("config.json");
    }
    match files.iter().find(|file| !student.path.join(file).exists()) {
        None => Ok(()),
        Some(file) => Err(Exit::Usage(format!(
            "`student.path` = {} has no {file}, which `distill train` needs; download the student's \
             Hugging Face folder to that path, or leave out `[student]` until you have one",
            student.path.display()
        ))
        .into()),
    }
}

/// Returns the body of the first request; None if the plan has no rows.
fn first_request(plan: &Plan) -> Option<serde_json::Value> {
    let upstream = plan
        .rows_by_endpoint
        .iter()
        .position(|rows| !rows.is_empty())?;
    let row = &plan.rows[plan.rows_by_endpoint[upstream].start];
    Some(plan.body(upstream, row.prompt as usize, row.sample))
}
