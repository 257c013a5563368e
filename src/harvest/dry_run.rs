//! `harvest --dry-run`: what would be asked and what it would cost, and everything that the night would
//! refuse. Sends nothing, writes nothing.

use std::path::Path;

use anyhow::Result;
use tokio::time::Instant;

use super::{books, judge};
use crate::budget::account::Account;
use crate::budget::dollars::Dollars;
use crate::budget::ledger::Store;
use crate::cache;
use crate::client::http::Teacher;
use crate::client::request;
use crate::config::{Config, Init, Mode, Student};
use crate::exit::Exit;
use crate::harvest::options::HarvestOptions;
use crate::harvest::window::{Schedule, State};
use crate::plan::again;
use crate::plan::estimate::Estimate;
use crate::plan::prepare::{askings, census_of, check_fits, check_money, prompts, sample};
use crate::plan::unanswered::Unanswered;
use crate::plan::{Plan, Scope};
use crate::report::summary::Summary;
use crate::signal::StopFlag;
use crate::terminal::format_dollars;

pub(crate) fn run(config: &Config, options: &HarvestOptions) -> Result<Summary> {
    check(config, options)?;
    let is_batch = config.schedule.mode == Mode::Batch;
    let config = &if is_batch {
        config.at_batch_prices()
    } else {
        config.clone()
    };
    let prompts = prompts(&config.prompts, options.limit, &StopFlag::default())?;
    let dir = config.own_cache();
    let known = crate::cache::open::peek(&dir)?;
    let stats = sample(&dir)?;
    let askings = askings(config, &[])?;
    let unanswered = Unanswered::load(&config.run_dir)?;
    let mut past = known.past.clone();
    past.has_schema_1 |=
        crate::harvest::batch::journal::is_under_way(&config.run_dir)? || !unanswered.is_empty();
    let max_attempts = config.retry.max_attempts;
    let standing = |key: &str| Ok(unanswered.standing(key, known.contains(key), max_attempts));
    let plan = if options.again.is_empty() {
        let scope = Scope {
            shard: options.shard,
            only: None,
        };
        Plan::new(prompts, askings, &config.prompts, scope, &past, standing)?
    } else {
        again::select(config, &options.again, options.shard, &prompts, &unanswered)?.plan
    };
    for lane in 0..plan.lanes.len() {
        check_fits(config, &plan, lane)?;
    }
    let mut estimate = Estimate::new(&plan, &stats, known.bytes_per_record());
    if is_batch {
        estimate.minutes = 0.0;
        estimate.batches = Some(crate::harvest::batch::outlook::outlook(config, &plan)?);
    }
    if options.again.is_empty() {
        estimate.cached = census_of(&dir, &plan, known.len(), u64::MAX, &StopFlag::default())?;
    }
    estimate.first_request = first_request(&plan);
    let mut summary = Summary {
        pending: plan.rows.len() as u64,
        estimate: Some(estimate),
        arguments: config.arguments(),
        ..Summary::of_plan(&plan, &unanswered)
    };
    summary.warnings.extend(plan.told_of_repeats());
    let cached_usd = known.cost_usd + judge::cost_usd(config)?;
    let account = books::look(config, cached_usd)?;
    tell_money(&mut summary, &plan, &account);
    tell_waits(&mut summary, config, &plan, account)?;
    // Better found out before its answers are paid for; below what was asked for.
    summary.error = check_student(config).err();
    Ok(summary)
}

/// Adds the budget left, and a warning if it may end the run early.
fn tell_money<S: Store>(summary: &mut Summary, plan: &Plan, account: &Account<S>) {
    let Some(cap) = account.cap() else { return };
    summary.budget_usd = Some(cap.usd());
    summary.run_folder_usd = Some(account.spent().total().usd());
    let most = summary
        .estimate
        .as_ref()
        .and_then(|estimate| estimate.cost_usd);
    let room = account.room();
    let left = format_dollars(room.usd());
    if let Some(least) = cheapest(plan, account).filter(|least| *least > room) {
        summary.warnings.push(format!(
            "{left} of the budget are left, and {} must be set aside for a request: nothing would be sent; \
             raise `budget.usd`",
            format_dollars(least.usd())
        ));
    } else if let Some((_, most)) = most.filter(|(_, most)| *most > room.usd()) {
        summary.warnings.push(format!(
            "{left} of the budget are left, and the rest may cost {}: the run may stop before its end",
            format_dollars(most)
        ));
    }
}

/// The least that must be set aside for a row: nothing for one without a price.
fn cheapest<S: Store>(plan: &Plan, account: &Account<S>) -> Option<Dollars> {
    let lanes = plan.lanes.iter().zip(&plan.askings).enumerate();
    let rows = lanes.flat_map(|(lane, (rows, asking))| {
        let least = move |row| {
            account
                .bound(&plan.bound(lane, row), &asking.lane.price)
                .usd
        };
        rows.clone().map(least)
    });
    rows.min()
}

/// Adds a warning for each wait that a run started now would begin with.
fn tell_waits<S: Store>(
    summary: &mut Summary,
    config: &Config,
    plan: &Plan,
    mut account: Account<S>,
) -> Result<()> {
    let now = jiff::Timestamp::now();
    let schedule = Schedule::new(&config.schedule, now)?;
    if let State::Closed(until) = schedule.state(now) {
        summary.warnings.push(format!(
            "outside the window: a run that begins now waits until {}",
            schedule.show(until)
        ));
    }
    if config.schedule.mode == Mode::Batch {
        return Ok(());
    }
    for (asking, rows) in plan.askings.iter().zip(&plan.lanes) {
        let begun = Instant::now();
        let mut day = books::day(&mut account, &asking.lane, now);
        if let (false, Err(until)) = (rows.is_empty(), day.check(begun)) {
            let until = now.checked_add(until - begun).unwrap_or(now);
            summary.warnings.push(format!(
                "`limits.requests_per_day` of {} is used up: a run that begins now waits until {}",
                asking.lane.teacher.label(),
                schedule.show(until)
            ));
        }
    }
    Ok(())
}

/// Refuses what the night would.
fn check(config: &Config, options: &HarvestOptions) -> Result<()> {
    request::check(config)?;
    for lane in config.lanes() {
        Teacher::new(&lane.teacher)?;
    }
    let now = jiff::Timestamp::now();
    Schedule::new(&config.schedule, now)?.check_not_over(now)?;
    if config.run_dir.exists() && !config.run_dir.is_dir() {
        let message = format!("`run_dir` = {} is a file", config.run_dir.display());
        return Err(Exit::Usage(message).into());
    }
    check_money(config, options.shard, now)?;
    if config.schedule.mode == Mode::Realtime {
        crate::harvest::batch::journal::check_none_under_way(&config.run_dir)?;
    }
    cache::open_file::check_nothing_displaced(&config.own_cache())
}

/// Refuses a student that cannot be trained, where one is named.
fn check_student(config: &Config) -> Result<()> {
    let folder = config.file.as_deref().and_then(Path::parent);
    let unset = Student {
        path: folder
            .unwrap_or(Path::new(""))
            .join(Student::default().path),
        ..Student::default()
    };
    let student = &config.student;
    if *student == unset {
        return Ok(());
    }
    let mut files = vec!["tokenizer.json"];
    if student.init == Init::Pretrained {
        files.push("config.json");
    }
    match files.iter().find(|file| !student.path.join(file).exists()) {
        None => Ok(()),
        Some(file) => Err(Exit::Usage(format!(
            "`student.path` = {} has no {file}: `distill train` would not begin; download the student's \
             Hugging Face folder to there, or leave `[student]` out until you have one",
            student.path.display()
        ))
        .into()),
    }
}

/// The body of the request that would be sent first.
fn first_request(plan: &Plan) -> Option<serde_json::Value> {
    let lane = plan.lanes.iter().position(|rows| !rows.is_empty())?;
    let row = &plan.rows[plan.lanes[lane].start];
    Some(plan.body(lane, row.prompt as usize, row.sample))
}
