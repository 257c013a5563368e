//! Operating-system limits and settings of this process: activations, threads, descriptors, signals.

/// Descriptors that are not for connections: files, looking names up, what a library opens.
const RESERVED_DESCRIPTORS: usize = 96;

/// The most descriptors that are ever asked for; some systems have no limit, and tables that grow with it.
#[cfg(unix)]
const MAX_DESCRIPTORS: libc::rlim_t = 65_536;

/// Number of connections that the process may hold open, after raising the soft descriptor limit to
/// what is allowed. None where there is no such limit.
pub fn max_connections() -> Option<usize> {
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
            let wanted = limit.rlim_max.min(MAX_DESCRIPTORS).max(limit.rlim_cur);
            if wanted > limit.rlim_cur {
                let before = limit.rlim_cur;
                limit.rlim_cur = wanted;
                if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) != 0 {
                    limit.rlim_cur = before;
                }
            }
            limit.rlim_cur
        };
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        // Of few, half.
        Some(
            descriptors
                .saturating_sub(RESERVED_DESCRIPTORS)
                .max(descriptors / 2),
        )
    }
    #[cfg(not(unix))]
    None
}

/// Returns true if the process or the machine has run out of file descriptors.
pub fn is_out_of_descriptors(error: &std::io::Error) -> bool {
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

/// Bytes of memory that the process takes up. None where the system does not tell.
pub fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1_024)
}

/// Gives memory that the allocator holds and nothing uses back to the system, after work that has left much
/// of it in small blocks.
pub fn trim_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the call only concerns blocks that are free, and may be made at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Was the process started with this signal ignored, as `nohup` does?
#[cfg(unix)]
pub fn is_signal_ignored(signal: i32) -> bool {
    // SAFETY: a null pointer asks for the action and changes none; the other one is to a structure on this
    // stack that is all zeros, which is valid for it.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut action) == 0
            && action.sa_sigaction == libc::SIG_IGN
    }
}

/// Makes the process fit for training. Call it first in `main`, before any thread is started.
///
/// glibc keeps large blocks instead of giving each back to the system. The passes of a training take
/// their memory from an arena, but what candle allocates (weights while they load, and everything
/// where its own operations run) would be mapped anew each time, page by page.
///
/// candle's own element-wise operations stay on the calling thread. They would start a second
/// pool whose threads wait by spinning, on the cores that the operations of this room compute on;
/// on two cores that halves the speed of training a small model. A value that the user has set
/// stays.
pub fn configure() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` only sets two tunables of the allocator and may be called at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
    const CANDLE_THREADS: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(CANDLE_THREADS).is_none() {
        // SAFETY: no other thread exists yet that could read the environment at the same time.
        unsafe { std::env::set_var(CANDLE_THREADS, "1") };
    }
}
