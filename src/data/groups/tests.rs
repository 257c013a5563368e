use serde_json::json;

use super::*;

fn group(endpoint: &str, model: &str, temperature: f64) -> Group {
    Group {
        endpoint: question::endpoint("", endpoint),
        model: model.into(),
        sampling: question::sampling(&json!({"temperature": temperature})),
        is_mock: false,
    }
}

fn candidate(group: &Group, key: &str, cut_at: u32) -> Candidate {
    Candidate::new(group.clone(), key, cut_at)
}

/// A group, the same under the name of its teacher, and the same of a mock.
fn variants() -> [Group; 3] {
    let plain = group("http://a/v1", "m", 1.0);
    let named = Group {
        endpoint: "name:mine".into(),
        ..plain.clone()
    };
    let mock = Group {
        is_mock: true,
        ..plain.clone()
    };
    [plain, named, mock]
}

#[test]
fn answers_of_the_config_are_told_from_others() {
    let request =
        json!({"model": "m", "temperature": 1.0, "seed": 7, "max_tokens": 5, "messages": []});
    let asked = |rows: Option<Rows>| {
        Selection::Asked(Asked {
            rows,
            teachers: vec![Teacher::new("mine", "http://a/v1", &request)],
        })
    };
    let [ours, other] = ["1", "2"].map(|digit| digit.repeat(64));
    let known = asked(Some(Rows {
        keys: Keys::from_iter([keys::fingerprint(&ours)]),
        questions: Keys::from_iter([question::fingerprint(&ours)]),
    }));
    // The same question, under the key of a truncated answer.
    let cut = format!("{}{}", "3".repeat(32), "1".repeat(32));
    let adoptable = format!("{}{}", "4".repeat(32), "1".repeat(32));
    let [plain, named, mock] = variants();
    let elsewhere = group("http://b/v1", "m", 1.0);
    let model = group("http://a/v1", "n", 1.0);
    let cooler = group("http://a/v1", "m", 0.5);
    let cases = [
        (&plain, &ours, 0, Ok(())),
        // Taken over by `cache adopt`.
        (&elsewhere, &ours, 0, Ok(())),
        (&mock, &ours, 0, Err(Difference::Mock)),
        (&elsewhere, &adoptable, 0, Err(Difference::Adoptable)),
        (&plain, &other, 0, Err(Difference::Question)),
        (&named, &other, 0, Err(Difference::Question)),
        (&named, &cut, 16, Err(Difference::Truncated)),
        (&elsewhere, &other, 0, Err(Difference::Endpoint)),
        (&model, &other, 0, Err(Difference::Model)),
        (&cooler, &other, 0, Err(Difference::Sampling)),
    ];
    for (group, key, cut_at, expected) in cases {
        let found = known.check(&candidate(group, key, cut_at));
        assert_eq!(found, expected, "{group} {key}");
    }
    // Without the prompts.
    let unknown = asked(None);
    assert_eq!(unknown.check(&candidate(&named, &other, 0)), Ok(()));
    let found = unknown.check(&candidate(&model, &other, 0));
    assert_eq!(found, Err(Difference::Model));
}

#[test]
fn groups_are_named_by_id_model_endpoint_and_teacher() {
    let [plain, named, mock] = variants();
    let is_in = |name: &str, group| {
        let selection = Selection::Named(vec![name.into()]);
        selection.check(&candidate(group, "", 0)).is_ok()
    };
    assert!(is_in(&plain.id(), &plain) && is_in("m", &plain) && is_in("http://a/v1", &plain));
    assert!(is_in("mine", &named) && !is_in("mine", &plain) && !is_in("mock", &plain));
    let local = group("http://localhost/v1", "m", 1.0);
    assert!(is_in("http://127.0.0.1:80/v1", &local));
    assert!(is_in("mock", &mock) && is_in(&mock.id(), &mock) && !is_in(&plain.id(), &mock));
    assert!(!is_in("m", &mock) && !is_in("http://a/v1", &mock));
    let all = |group| Selection::All.check(&candidate(group, "", 0));
    assert_eq!(all(&mock), Err(Difference::Mock));
    assert_eq!(all(&named), Ok(()));
}
