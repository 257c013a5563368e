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
    let plain = group("http://a/v1", "m", 1.0);
    let named = Group {
        endpoint: "name:mine".into(),
        ..plain.clone()
    };
    let mock = Group {
        is_mock: true,
        ..plain.clone()
    };
    let elsewhere = group("http://b/v1", "m", 1.0);
    let cases = [
        (&plain, &ours, 0, None),
        // Taken over by `cache adopt`.
        (&elsewhere, &ours, 0, None),
        (&mock, &ours, 0, Some(Difference::Mock)),
        (&plain, &other, 0, Some(Difference::Question)),
        (&named, &other, 0, Some(Difference::Question)),
        (&named, &cut, 16, Some(Difference::Truncated)),
        (&elsewhere, &other, 0, Some(Difference::Endpoint)),
        (
            &group("http://a/v1", "n", 1.0),
            &other,
            0,
            Some(Difference::Model),
        ),
        (
            &group("http://a/v1", "m", 0.5),
            &other,
            0,
            Some(Difference::Sampling),
        ),
    ];
    for (group, key, cut_at, expected) in cases {
        let name = Name { key, cut_at };
        assert_eq!(known.difference(group, name), expected, "{group} {key}");
    }
    // Without the prompts.
    let unknown = asked(None);
    let name = Name {
        key: &other,
        cut_at: 0,
    };
    assert_eq!(unknown.difference(&named, name), None);
    let model = group("http://a/v1", "n", 1.0);
    assert_eq!(unknown.difference(&model, name), Some(Difference::Model));
}

#[test]
fn groups_are_named_by_id_model_endpoint_and_teacher() {
    let plain = group("http://a/v1", "m", 1.0);
    let named = Group {
        endpoint: "name:mine".into(),
        ..plain.clone()
    };
    let mock = Group {
        is_mock: true,
        ..plain.clone()
    };
    let any = Name { key: "", cut_at: 0 };
    let is_in = |name: &str, group| {
        let selection = Selection::Named(vec![name.into()]);
        selection.difference(group, any).is_none()
    };
    assert!(is_in(&plain.id(), &plain) && is_in("m", &plain) && is_in("http://a/v1", &plain));
    assert!(is_in("mine", &named) && !is_in("mine", &plain) && !is_in("mock", &plain));
    assert!(is_in("mock", &mock) && !is_in(&plain.id(), &mock));
    assert_eq!(
        Selection::All.difference(&mock, any),
        Some(Difference::Mock)
    );
    assert_eq!(Selection::All.difference(&named, any), None);
}
