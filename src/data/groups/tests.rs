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
    let [answered, open] = ["1", "5"].map(|digit| digit.repeat(64));
    let [answered, open] = [answered, open].map(|key| question::question_fingerprint(&key));
    let known = asked(Some(Rows {
        keys: KeySet::from_iter([crate::cache::fingerprint::fingerprint(&ours)]),
        answered: KeySet::from_iter([answered]),
        questions: KeySet::from_iter([answered, open]),
    }));
    // Of the same questions, under other keys.
    let [second, cut] = ["1", "5"].map(|digit| format!("{}{}", "3".repeat(32), digit.repeat(32)));
    let [plain, named, mock] = variants();
    let elsewhere = group("http://b/v1", "m", 1.0);
    let model = group("http://a/v1", "n", 1.0);
    let cooler = group("http://a/v1", "m", 0.5);
    let cases = [
        (&plain, &ours, 0, Ok(())),
        // Taken over by `cache adopt`.
        (&elsewhere, &ours, 0, Ok(())),
        (&mock, &ours, 0, Err(Difference::Mock)),
        (&plain, &second, 0, Err(Difference::Duplicate)),
        (&plain, &second, 16, Err(Difference::Duplicate)),
        (&elsewhere, &cut, 0, Err(Difference::Adoptable)),
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

#[test]
fn names_in_a_cache_stay_on_their_line_without_control_characters() {
    let hostile = group(
        "http://a/v1\u{1b}[2J",
        "m\u{1b}]0;x\u{7}\nsecond\tline",
        1.0,
    );
    for shown in [hostile.to_string(), hostile.model_and_sampling()] {
        assert!(!shown.contains(char::is_control), "{shown:?}");
        assert!(shown.contains("second line"), "{shown:?}");
    }
}
