//! Settings that are written as text and parsed when the config is read: see [`Parsed`].

use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use regex::Regex;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use toml::value::Datetime;

/// A value and the text from which it was parsed. It is serialised and compared as text.
#[derive(Clone, Serialize)]
#[serde(into = "String", bound(serialize = "T: Clone"))]
pub struct Parsed<T> {
    text: String,
    value: T,
}

/// Parses the text of a setting.
pub trait ParseSetting: Sized {
    /// # Errors
    /// A message that quotes the text and describes what is expected.
    fn parse_setting(text: &str) -> Result<Self, String>;
}

impl<T> Parsed<T> {
    /// Returns the text as written in the config.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl<T> Deref for Parsed<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: ParseSetting> TryFrom<String> for Parsed<T> {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let value = T::parse_setting(&text)?;
        Ok(Self { text, value })
    }
}

/// Accepts strings, and TOML's unquoted dates and times: `as_of = 2026-11-22`.
impl<'de, T: ParseSetting> Deserialize<'de> for Parsed<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;

        impl<'de> Visitor<'de> for TextVisitor {
            type Value = String;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
                Ok(text.to_owned())
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<String, A::Error> {
                let datetime = Datetime::deserialize(MapAccessDeserializer::new(map));
                Ok(datetime
                    .map_err(|_| A::Error::custom("expected a string"))?
                    .to_string())
            }
        }

        let text = deserializer.deserialize_any(TextVisitor)?;
        Self::try_from(text).map_err(D::Error::custom)
    }
}

impl<T: ParseSetting> FromStr for Parsed<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::try_from(text.to_owned())
    }
}

impl<T> From<Parsed<T>> for String {
    fn from(parsed: Parsed<T>) -> String {
        parsed.text
    }
}

impl<T> fmt::Debug for Parsed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

impl<T> PartialEq for Parsed<T> {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl ParseSetting for Regex {
    fn parse_setting(text: &str) -> Result<Regex, String> {
        Regex::new(text).map_err(|error| {
            // The lines before the last one show the position in the pattern; the last one is the reason.
            let error = error.to_string();
            let reason = error.lines().last().unwrap_or_default();
            let reason = reason.trim_start_matches("error: ");
            format!("{text:?} is not a valid regular expression: {reason}")
        })
    }
}

impl ParseSetting for Date {
    fn parse_setting(text: &str) -> Result<Date, String> {
        text.parse()
            .map_err(|_| format!("{text:?} is not a valid date: expected one like \"2026-11-22\""))
    }
}

impl ParseSetting for TimeZone {
    fn parse_setting(text: &str) -> Result<TimeZone, String> {
        TimeZone::get(text).map_err(|_| {
            format!("{text:?} is not a valid time zone: expected a name like \"Europe/Berlin\"")
        })
    }
}

/// Daily window between two different times of day.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DailyWindow {
    pub opens: Time,
    pub closes: Time,
}

impl ParseSetting for DailyWindow {
    fn parse_setting(text: &str) -> Result<DailyWindow, String> {
        let times = text.split_once('-').and_then(|(opens, closes)| {
            let opens: Time = opens.trim().parse().ok()?;
            let closes: Time = closes.trim().parse().ok()?;
            (opens != closes).then_some(DailyWindow { opens, closes })
        });
        times.ok_or_else(|| {
            format!(
                "{text:?} is not a valid window: expected two different times of day, like \"22:00-06:30\""
            )
        })
    }
}

/// Time at which a run stops.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Deadline {
    /// The next occurrence of a time of day, in the time zone `schedule.timezone`.
    TimeOfDay(Time),
    /// A date and time in the time zone `schedule.timezone`.
    Local(DateTime),
    /// A point in time with its own offset from UTC.
    Instant(Timestamp),
}

impl ParseSetting for Deadline {
    fn parse_setting(text: &str) -> Result<Deadline, String> {
        if let Ok(instant) = text.parse() {
            return Ok(Deadline::Instant(instant));
        }
        if let Ok(local) = text.parse() {
            return Ok(Deadline::Local(local));
        }
        let time = text.parse().map(Deadline::TimeOfDay);
        time.map_err(|_| {
            format!(
                "{text:?} is not a valid time: expected \"06:30\", \"2026-11-23 06:30\" or an RFC 3339 timestamp"
            )
        })
    }
}

impl Deadline {
    /// Returns the deadline of a run that starts at `now`; `None` if it is later than the last date of the calendar.
    pub fn after(self, now: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let timestamp = |local: DateTime| Some(local.to_zoned(zone.clone()).ok()?.timestamp());
        match self {
            Deadline::Instant(instant) => Some(instant),
            Deadline::Local(local) => timestamp(local),
            Deadline::TimeOfDay(time) => {
                let today = now.to_zoned(zone.clone()).date().to_datetime(time);
                match timestamp(today) {
                    Some(deadline) if deadline > now => Some(deadline),
                    _ => timestamp(today.checked_add(1.day()).ok()?),
                }
            }
        }
    }
}

/// Serialises and deserialises a [`Duration`](std::time::Duration) as a number of seconds.
pub(crate) mod seconds {
    use std::time::Duration;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    /// Maximum number of seconds of a setting, about 32 years.
    const MAX: f64 = 1e9;

    pub(crate) fn serialize<S: Serializer>(
        duration: &Duration,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(duration.as_secs_f64())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Duration, D::Error> {
        let seconds = f64::deserialize(deserializer)?;
        if (0.0..=MAX).contains(&seconds) {
            Ok(Duration::from_secs_f64(seconds))
        } else {
            let message = format!("{seconds} is not a valid time: expected 0 to 1e9 seconds");
            Err(D::Error::custom(message))
        }
    }
}
