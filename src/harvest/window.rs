//! Daily window in which requests may be sent, and the deadline of a run. Pure: the time is an argument.
//!
//! Times of day are wall-clock times in the configured time zone, so a window from 22:00 to 06:30 is an hour longer
//! or shorter when daylight saving time changes.

use std::time::Duration;

use anyhow::Result;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

use crate::config::{DailyWindow, Deadline, Parsed, ScheduleConfig};
use crate::exit::Exit;

/// Maximum time between two checks of the window and the deadline. The wall clock may be adjusted meanwhile.
pub(crate) const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// Window and deadline of one run, from `[schedule]`.
#[derive(Debug, Clone)]
pub(crate) struct RequestWindow {
    window: Option<DailyWindow>,
    deadline: Option<Timestamp>,
    zone: TimeZone,
}

/// State of the request window at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WindowState {
    Open,
    /// Outside the window, which opens at the given time.
    Closed(Timestamp),
    /// The deadline has passed.
    Over,
}

/// Error of a run whose deadline has passed.
pub(crate) fn deadline_passed() -> anyhow::Error {
    let message = "the deadline has passed; rerun the command to request the remaining rows (set a later \
                   `schedule.deadline` first if it has a date)";
    Exit::Resumable(message.into()).into()
}

impl RequestWindow {
    /// Creates the window of a run that starts at `now`.
    ///
    /// # Errors
    /// [`Exit::Usage`] if the deadline is outside the calendar.
    pub(crate) fn new(config: &ScheduleConfig, now: Timestamp) -> Result<RequestWindow> {
        let zone = match &config.timezone {
            Some(zone) => TimeZone::clone(zone),
            None => TimeZone::system(),
        };
        let deadline = |text: &Parsed<Deadline>| {
            text.after(now, &zone).ok_or_else(|| {
                Exit::Usage(format!(
                    "schedule.deadline = {:?} is outside the calendar",
                    text.text()
                ))
            })
        };
        Ok(RequestWindow {
            window: config.window.as_deref().copied(),
            deadline: config.deadline.as_ref().map(deadline).transpose()?,
            zone,
        })
    }

    /// Checks that the deadline has not passed.
    ///
    /// # Errors
    /// [`Exit::Resumable`] if it has.
    pub(crate) fn check_not_over(&self, now: Timestamp) -> Result<()> {
        match self.state(now) {
            WindowState::Over => Err(deadline_passed()),
            _ => Ok(()),
        }
    }

    /// Returns the state of the window at `now`.
    pub(crate) fn state(&self, now: Timestamp) -> WindowState {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            return WindowState::Over;
        }
        let Some(DailyWindow { opens, closes }) = self.window else {
            return WindowState::Open;
        };
        let local = now.to_zoned(self.zone.clone());
        let time = local.time();
        let is_open = if opens < closes {
            opens <= time && time < closes
        } else {
            opens <= time || time < closes
        };
        if is_open {
            return WindowState::Open;
        }
        let today = local.date().to_datetime(opens);
        let next = if time < opens {
            Ok(today)
        } else {
            today.checked_add(1.day())
        };
        // When clocks go back, the opening time may occur twice, and the first occurrence may have passed.
        let opening = next.and_then(|next| {
            let opening = next.to_zoned(self.zone.clone())?;
            if opening.timestamp() > now {
                Ok(opening)
            } else {
                self.zone.to_ambiguous_zoned(next).later()
            }
        });
        // At the end of the calendar no later opening exists: do not wait.
        WindowState::Closed(opening.map_or(now, |opening| opening.timestamp()))
    }

    /// Formats a time in the configured time zone.
    pub(crate) fn show(&self, time: Timestamp) -> String {
        time.to_zoned(self.zone.clone())
            .strftime("%Y-%m-%d %H:%M")
            .to_string()
    }
}

#[cfg(test)]
mod tests {
    use jiff::civil::DateTime;

    use super::*;

    fn schedule_config(window: &str, deadline: &str) -> ScheduleConfig {
        ScheduleConfig {
            mode: crate::config::RequestMode::Realtime,
            window: (!window.is_empty()).then(|| window.parse().unwrap()),
            deadline: (!deadline.is_empty()).then(|| deadline.parse().unwrap()),
            timezone: Some("Europe/Berlin".parse().unwrap()),
        }
    }

    fn at(text: &str) -> Timestamp {
        let civil: DateTime = text.parse().unwrap();
        civil.in_tz("Europe/Berlin").unwrap().timestamp()
    }

    fn states(window: &str, times: &[&str]) -> Vec<String> {
        let schedule = RequestWindow::new(&schedule_config(window, ""), at(times[0])).unwrap();
        times
            .iter()
            .map(|time| match schedule.state(at(time)) {
                WindowState::Open => "open".into(),
                WindowState::Closed(until) => schedule.show(until),
                WindowState::Over => "over".into(),
            })
            .collect()
    }

    #[test]
    fn window_may_cross_midnight() {
        let times = [
            "2026-11-22 21:59",
            "2026-11-22 22:00",
            "2026-11-23 03:00",
            "2026-11-23 06:30",
        ];
        let expected = ["2026-11-22 22:00", "open", "open", "2026-11-23 22:00"];
        assert_eq!(states("22:00-06:30", &times), expected);
        let expected = [
            "2026-11-23 01:00",
            "2026-11-23 01:00",
            "open",
            "2026-11-24 01:00",
        ];
        assert_eq!(states("01:00 - 05:00", &times), expected);
    }

    #[test]
    fn window_follows_daylight_saving_time() {
        // 02:00 to 03:00 does not exist on this day in March and occurs twice on the day in October.
        let schedule =
            RequestWindow::new(&schedule_config("02:30-04:00", ""), at("2026-03-29 00:00"))
                .unwrap();
        let before = at("2026-03-29 01:59");
        let WindowState::Closed(until) = schedule.state(before) else {
            panic!("the window is open");
        };
        assert!(until > before && schedule.show(until) == "2026-03-29 03:30");
        assert_eq!(schedule.state(at("2026-03-29 03:00")), WindowState::Open);

        let schedule = RequestWindow::new(&schedule_config("02:15-02:45", ""), before).unwrap();
        let first = at("2026-10-25 02:30");
        assert_eq!(schedule.state(first), WindowState::Open);
        let again = first.checked_add(1.hour()).unwrap();
        assert_eq!(schedule.state(again), WindowState::Open);
        let between = first.checked_add(30.minutes()).unwrap();
        assert!(matches!(schedule.state(between), WindowState::Closed(until) if until > between));
    }

    #[test]
    fn deadline_without_a_date_is_its_next_occurrence() {
        let deadline = |text: &str| {
            let schedule =
                RequestWindow::new(&schedule_config("", text), at("2026-11-22 22:00")).unwrap();
            schedule.show(schedule.deadline.unwrap())
        };
        assert_eq!(deadline("06:30"), "2026-11-23 06:30");
        assert_eq!(deadline("22:30"), "2026-11-22 22:30");
        assert_eq!(deadline("2026-12-01 05:00"), "2026-12-01 05:00");
        assert_eq!(deadline("2026-11-23T00:00:00Z"), "2026-11-23 01:00");
        let schedule =
            RequestWindow::new(&schedule_config("", "06:30"), at("2026-11-22 22:00")).unwrap();
        assert_eq!(schedule.state(at("2026-11-23 06:29")), WindowState::Open);
        assert_eq!(schedule.state(at("2026-11-23 06:30")), WindowState::Over);
    }

    #[test]
    fn deadline_past_the_calendar_is_a_usage_error() {
        let mut config = schedule_config("", "9999-12-31 23:59");
        config.timezone = Some("America/New_York".parse().unwrap());
        let error = RequestWindow::new(&config, at("2026-11-22 22:00")).unwrap_err();
        assert_eq!(Exit::code_of(&error), 2, "{error:#}");
    }
}
