//! Operating-system limits and settings of this process: memory, threads, file descriptors, signals.

/// Number of file descriptors reserved for files, name resolution and libraries.
const RESERVED_DESCRIPTORS: usize = 96;

/// Maximum number of descriptors requested. Some systems have no hard limit, but allocate tables in
/// proportion to the soft limit.
#[cfg(unix)]
const MAX_DESCRIPTORS: libc::rlim_t = 65_536;

/// Raises the soft descriptor limit as far as allowed, up to `MAX_DESCRIPTORS`, and returns the number of connections
/// that the process may hold open. Returns None where the system does not report such a limit.
pub(crate) fn max_connections() -> Option<usize> {
    #[cfg(unix)]
    {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: both calls get a valid pointer to a structure that lives on this stack.
        let descriptors = unsafe {
            if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) != 0 {
                return None;
            }
            let target = limit.rlim_max.min(MAX_DESCRIPTORS).max(limit.rlim_cur);
            if target > limit.rlim_cur {
                let previous = limit.rlim_cur;
                limit.rlim_cur = target;
                if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) != 0 {
                    limit.rlim_cur = previous;
                }
            }
            limit.rlim_cur
        };
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        // With few descriptors, connections get half of them.
        Some(
            descriptors
                .saturating_sub(RESERVED_DESCRIPTORS)
                .max(descriptors / 2),
        )
    }
    #[cfg(not(unix))]
    None
}

/// Returns true if `error` means that the process or the machine has run out of file descriptors.
pub(crate) fn is_out_of_descriptors(error: &std::io::Error) -> bool {
    #[cfg(unix)]
    {
        matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
    }
    #[cfg(not(unix))]
    {
        let _ = error;
        false
    }
}

/// Returns the resident memory of the process in bytes, or None where the system does not report it.
pub(crate) fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1_024)
}

/// Gives free memory of the allocator back to the system. Call it after work that leaves many small free
/// blocks.
pub(crate) fn trim_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the call only concerns blocks that are free, and may be made at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Returns true if the process was started with this signal ignored, as `nohup` does.
#[cfg(unix)]
pub(crate) fn is_signal_ignored(signal: i32) -> bool {
    // SAFETY: with a null pointer as new action, the call only reads the current one. The other pointer
    // is to a structure on this stack, for which all zeros are valid.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut action) == 0
            && action.sa_sigaction == libc::SIG_IGN
    }
}

/// Configures the process. Call it first in `main`, before any thread is started.
///
/// Ignores SIGXFSZ, so that a write beyond the limit of `ulimit -f` is an error, as on a full disk, and not a kill.
///
/// Makes glibc keep large free blocks. Training takes its memory from an arena, but candle allocates
/// from glibc: weights while they load, and everything that its own operations compute. Without this
/// setting, each of these blocks would be mapped anew, page by page.
///
/// Keeps candle's element-wise operations on the calling thread, unless the user has set
/// `CANDLE_NUM_THREADS`. They would start a second thread pool that waits by spinning on the cores
/// of the first; on two cores this halves the speed of training a small model.
pub fn configure() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` only sets two tunables of the allocator and may be called at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
    // SAFETY: no other thread exists yet that could handle the signal.
    #[cfg(unix)]
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
    const CANDLE_THREADS: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(CANDLE_THREADS).is_none() {
        // SAFETY: no other thread exists yet that could read the environment at the same time.
        unsafe { std::env::set_var(CANDLE_THREADS, "1") };
    }
}
