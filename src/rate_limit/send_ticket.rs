//! TODO

use crate::rate_limit::cost::RequestCost;
use crate::rate_limit::headers::Resource;
use tokio::time::Instant;

/// What a request that has left remembers, so that its reply can be understood.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SendTicket {
    pub at: Instant,
    pub(crate) cost: RequestCost,
    /// What each bucket had been charged in all, this request included.
    pub(crate) charged: [f64; Resource::ALL.len()],
}
