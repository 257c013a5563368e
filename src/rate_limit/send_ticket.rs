//! [`SendTicket`]: send time and charges of a request.

use crate::rate_limit::cost::RequestCost;
use crate::rate_limit::headers::{LIMITS_PER_RESOURCE, Resource};
use tokio::time::Instant;

/// Send time and charges of a request, with which the rate-limit headers of its reply are interpreted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SendTicket {
    pub sent_at: Instant,
    pub(crate) cost: RequestCost,
    /// Amount charged to each bucket of the server's limits by all requests up to and including this one.
    pub(crate) charged: [f64; Resource::ALL.len() * LIMITS_PER_RESOURCE],
}
