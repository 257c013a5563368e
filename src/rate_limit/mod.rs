//! Rate limits: when a request may be sent, and how many may be in flight.
//!
//! Limits come from two sources: the user's config, and the headers of the endpoint's replies. The stricter one
//! applies.
//!
//! | file | content |
//! |---|---|
//! | `pacer` | all limits of one endpoint behind one `admit` call |
//! | `user_limits` | the user's requests and tokens per minute, by governor's GCRA |
//! | `daily` | the user's requests per day, across restarts |
//! | `redis/` | the user's limits shared by several processes (feature `redis`) |
//! | `headers` | parser of rate-limit headers, all dialects |
//! | `server_limits`, `bucket` | the server's limits as its headers report them, one bucket per resource |
//! | `concurrency` | maximum number of requests in flight, adapted to 429s and latency |
//! | `cost`, `send_ticket` | cost of a request; send time and charges of a sent request |
//! | `wait` | parser of waiting times in headers and messages |
//!
//! Invariants: in any minute, requests and tokens are at most the user's limit plus one burst (limits shared by Redis:
//! see the guarantees in `redis/mod.rs`); in any 24 hours, requests are at most the daily limit, even after a kill;
//! waiting uses the monotonic clock; only `redis/connection` accesses the network, and no file here accesses the disk.
//!
//! # How to add a rate-limit dialect
//!
//! 1. Add the prefix of its header names to `FAMILIES` in `headers.rs`, with two flags: whether the family counts
//!    tokens, and whether names without a resource and a period mean a limit per second.
//! 2. If its names have new words for a value, a resource or a period, add them to the `match` in
//!    `Field::parse`. An unknown word makes the parser ignore the header.
//! 3. If its reset values have a new format, add it to `until` in `wait.rs`.
//! 4. Add a captured reply to the cases of the test `rate_limit_headers_of_all_dialects_are_parsed`.
//! 5. If the limit refills in a new way, extend `LimitReport::refill` and the tests in `server_limits.rs`.
//! 6. To test it end to end, let the mock send these headers (`HeaderDialect` in `src/mock/script/limits.rs`).

pub(crate) mod bucket;
pub(crate) mod concurrency;
pub(crate) mod cost;
pub(crate) mod daily;
pub(crate) mod headers;
pub(crate) mod pacer;
pub(crate) mod redis;
pub(crate) mod send_ticket;
pub(crate) mod server_limits;
pub(crate) mod user_limits;
pub(crate) mod wait;
