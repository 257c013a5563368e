//! [`WallClock`]: the date and time, for timestamps of records, HTTP dates and the request window. Waiting uses tokio's
//! monotonic clock instead.

use std::sync::Arc;

use jiff::Timestamp;

/// The system clock, or a clock that a test controls.
#[derive(Clone)]
pub struct WallClock(Arc<dyn Fn() -> Timestamp + Send + Sync>);

impl WallClock {
    pub fn system() -> WallClock {
        WallClock(Arc::new(Timestamp::now))
    }

    pub fn from_fn(now: impl Fn() -> Timestamp + Send + Sync + 'static) -> WallClock {
        WallClock(Arc::new(now))
    }

    pub fn now(&self) -> Timestamp {
        (self.0)()
    }
}
