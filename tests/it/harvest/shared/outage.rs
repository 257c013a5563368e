//! Redis servers that cannot be used, from the start or for some time during a run.

use std::time::Duration;

use std::io::{Read, Write};
use std::net::TcpListener;

use super::server::free_port;
use super::*;
use crate::harvest::exit_of;

#[tokio::test(flavor = "multi_thread")]
async fn unusable_redis_at_start_is_an_error_with_advice() {
    let redis = Redis::with_password(Some("right"));
    let address = redis.url().replace(":right@", "");
    let unused_port = free_port();
    for (url, parts) in [
        (
            format!("redis://user:secret@127.0.0.1:{unused_port}/0"),
            vec![
                format!("redis://127.0.0.1:{unused_port}/0"),
                "refused".into(),
                "start it".into(),
            ],
        ),
        (
            redis.url().replace("right", "secret"),
            vec![address.clone(), "refuses".into(), "`limits.shared`".into()],
        ),
        (
            address.clone(),
            vec![address.clone(), "refuses".into(), "NOAUTH".into()],
        ),
        (
            "redis://:secret@[".into(),
            vec!["not a valid Redis address".into(), "redis://user".into()],
        ),
        (
            "http://:secret@host".into(),
            vec!["not a valid Redis address".into()],
        ),
        (
            "secret".into(),
            vec!["not a valid Redis address".into(), "%40".into()],
        ),
    ] {
        let run = run_at(&url, 3, per_minute(600));
        let teacher = RecordingTeacher::new(0);
        let error = harvest(&run, &teacher).await.unwrap_err();
        let message = format!("{error:#}");
        let is_usage_error = message.contains("is not a valid Redis address");
        let code = if is_usage_error { 2 } else { 1 };
        assert_eq!(Exit::code_of(&error), code, "{message}");
        for part in parts {
            assert!(message.contains(&part), "{part:?} is not in: {message:?}");
        }
        assert!(!message.contains("secret"), "{message}");
        assert_eq!(teacher.count(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn password_in_redis_error_is_not_shown() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut command = [0; 1_000];
        while stream.read(&mut command).is_ok_and(|length| length > 0) {
            let reply = if command.windows(4).any(|word| word == b"AUTH") {
                "+OK\r\n".repeat(3)
            } else {
                "-ERR no pa%20ss and no pa ss\r\n".into()
            };
            // The client may have closed the connection.
            let _ = stream.write_all(reply.as_bytes());
            command.fill(0);
        }
    });
    let url = format!("redis://:pa%20ss@127.0.0.1:{port}");
    let run = run_at(&url, 1, per_minute(600));
    let error = harvest(&run, &RecordingTeacher::new(0))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("[password] and no [password]"), "{error}");
    assert!(
        !error.contains("pa ss") && !error.contains("pa%20ss"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_outage_blocks_requests_then_exits_resumable() {
    let mut redis = Redis::start();
    let run = run(&redis, 200, per_minute(6_000));
    let teacher = RecordingTeacher::new(100);
    let kill_redis = async {
        teacher.wait_for_requests(80).await;
        redis.kill();
        let killed_at = Instant::now();
        // Requests with permits granted before the kill are still sent.
        tokio::time::sleep(Duration::from_millis(100)).await;
        (killed_at, teacher.count())
    };
    let (summary, (killed_at, sent_early)) = tokio::join!(harvest(&run, &teacher), kill_redis);
    let summary = summary.unwrap();
    let (code, message) = exit_of(&summary);
    assert_eq!(code, 4, "{message}");
    assert!(
        message.contains("limits.shared") && message.contains("resume"),
        "{message}"
    );
    // `retry.max_outage_s` is half a second.
    let outage = killed_at.elapsed();
    assert!(outage >= Duration::from_millis(500), "{outage:?}");
    assert!(outage < Duration::from_secs(10), "{outage:?}");
    // One more request may use a permit granted before the kill. All answers in flight are recorded.
    let sent = teacher.count();
    assert!(
        sent <= sent_early + 1,
        "{sent} requests, {sent_early} of them until 100 ms after the kill"
    );
    assert_eq!(summary.ok as usize, teacher.count());
    assert_eq!(run.records().len(), teacher.count());
}

#[tokio::test(flavor = "multi_thread")]
async fn run_continues_after_redis_outage() {
    type Change = fn(&mut Redis);
    let nothing: Change = |_| {};
    // Name of the fault, the fault, its repair, and whether requests are sent during the fault.
    let cases: [(&str, Change, Change, bool); 4] = [
        ("killed", Redis::kill, Redis::restart, false),
        (
            "out of memory",
            |redis| redis.command("CONFIG SET maxmemory 1"),
            |redis| redis.command("CONFIG SET maxmemory 0"),
            false,
        ),
        (
            "a replica",
            |redis| redis.command("REPLICAOF 127.0.0.1 1"),
            |redis| redis.command("REPLICAOF NO ONE"),
            false,
        ),
        (
            "without its scripts",
            |redis| redis.command("SCRIPT FLUSH"),
            nothing,
            true,
        ),
    ];
    for (name, break_server, repair_server, sends_requests) in cases {
        let mut redis = Redis::start();
        let mut run = run(&redis, 110, per_minute(6_000));
        run.config.retry.max_outage = Duration::from_secs_f64(10.0);
        let teacher = RecordingTeacher::new(1);
        let (summary, ()) = tokio::join!(harvest(&run, &teacher), async {
            teacher.wait_for_requests(80).await;
            break_server(&mut redis);
            let before = teacher.count();
            tokio::time::sleep(Duration::from_millis(150)).await;
            let sent = teacher.count() - before;
            assert_eq!(sent > 1, sends_requests, "{name}: {sent}");
            repair_server(&mut redis);
        });
        let summary = summary.unwrap();
        assert_eq!(summary.ok, 110, "{name}: {summary:?}");
        assert_eq!(teacher.count(), 110, "{name}");
    }
}
