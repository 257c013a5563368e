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

fn properties(group: &Group, key: &str, cut_at: u32) -> RecordProperties {
    RecordProperties::new(group.clone(), key, cut_at)
}

/// A group, the same group under the name of its teacher, and the same group of a mock.
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
fn config_selection_names_the_first_difference() {
    let request =
        json!({"model": "m", "temperature": 1.0, "seed": 7, "max_tokens": 5, "messages": []});
    let config_selection = |rows: Option<PlannedRows>| {
        Selection::Config(ConfigSelection {
            rows,
            teachers: vec![TeacherIdentity::new("mine", "http://a/v1", &request)],
        })
    };
    let [ours, other] = ["1", "2"].map(|digit| digit.repeat(64));
    let [answered, open] = ["1", "5"].map(|digit| digit.repeat(64));
    let [answered, open] = [answered, open].map(|key| question::question_fingerprint(&key));
    let with_prompts = config_selection(Some(PlannedRows {
        keys: KeySet::from_iter([crate::cache::fingerprint::fingerprint(&ours)]),
        answered: KeySet::from_iter([answered]),
        questions: KeySet::from_iter([answered, open]),
    }));
    // The same questions under other keys.
    let [second, cut] = ["1", "5"].map(|digit| format!("{}{}", "3".repeat(32), digit.repeat(32)));
    let [plain, named, mock] = variants();
    let other_endpoint = group("http://b/v1", "m", 1.0);
    let model = group("http://a/v1", "n", 1.0);
    let cooler = group("http://a/v1", "m", 0.5);
    let cases = [
        (&plain, &ours, 0, Ok(())),
        // Adopted by `cache adopt`.
        (&other_endpoint, &ours, 0, Ok(())),
        (&mock, &ours, 0, Err(ExclusionReason::Mock)),
        (&plain, &second, 0, Err(ExclusionReason::Duplicate)),
        (&plain, &second, 16, Err(ExclusionReason::Duplicate)),
        (&other_endpoint, &cut, 0, Err(ExclusionReason::Adoptable)),
        (&plain, &other, 0, Err(ExclusionReason::Question)),
        (&named, &other, 0, Err(ExclusionReason::Question)),
        (&named, &cut, 16, Err(ExclusionReason::Truncated)),
        (&other_endpoint, &other, 0, Err(ExclusionReason::Endpoint)),
        (&model, &other, 0, Err(ExclusionReason::Model)),
        (&cooler, &other, 0, Err(ExclusionReason::Sampling)),
    ];
    for (group, key, cut_at, expected) in cases {
        let found = with_prompts.check(&properties(group, key, cut_at));
        assert_eq!(found, expected, "{group} {key}");
    }
    let without_prompts = config_selection(None);
    assert_eq!(
        without_prompts.check(&properties(&named, &other, 0)),
        Ok(())
    );
    let found = without_prompts.check(&properties(&model, &other, 0));
    assert_eq!(found, Err(ExclusionReason::Model));
}

#[test]
fn selection_hash_depends_on_everything_that_selects_a_record() {
    let key = |digit: &str| crate::cache::fingerprint::fingerprint(&digit.repeat(64));
    let rows = |keys: &[&str], answered: &[&str], questions: &[&str]| {
        let set = |digits: &[&str]| digits.iter().map(|digit| key(digit)).collect();
        Some(PlannedRows {
            keys: set(keys),
            answered: set(answered),
            questions: set(questions),
        })
    };
    let config_rows = [
        // Without prompts, all answers of the teachers are selected; with prompts and without answers, none.
        None,
        rows(&[], &[], &[]),
        rows(&["1"], &[], &[]),
        rows(&[], &["1"], &[]),
        rows(&[], &[], &["1"]),
        rows(&["1", "2"], &["3"], &[]),
        rows(&["1"], &["2", "3"], &[]),
    ];
    let config = config_rows.map(|rows| {
        Selection::Config(ConfigSelection {
            rows,
            teachers: Vec::new(),
        })
    });
    let named = Selection::Named(vec!["all".into()]);
    let hashes: std::collections::HashSet<_> = config
        .iter()
        .chain([&Selection::All, &named])
        .map(|selection| {
            let mut hash = blake3::Hasher::new();
            selection.update(&mut hash);
            hash.finalize()
        })
        .collect();
    assert_eq!(hashes.len(), 9);
}

#[test]
fn groups_are_selected_by_id_model_endpoint_and_teacher() {
    let [plain, named, mock] = variants();
    let is_in = |name: &str, group| {
        let selection = Selection::Named(vec![name.into()]);
        selection.check(&properties(group, "", 0)).is_ok()
    };
    assert!(is_in(&plain.id(), &plain) && is_in("m", &plain) && is_in("http://a/v1", &plain));
    assert!(is_in("mine", &named) && !is_in("mine", &plain) && !is_in("mock", &plain));
    let local = group("http://localhost/v1", "m", 1.0);
    assert!(is_in("http://127.0.0.1:80/v1", &local));
    assert!(is_in("mock", &mock) && is_in(&mock.id(), &mock) && !is_in(&plain.id(), &mock));
    assert!(!is_in("m", &mock) && !is_in("http://a/v1", &mock));
    let all = |group| Selection::All.check(&properties(group, "", 0));
    assert_eq!(all(&mock), Err(ExclusionReason::Mock));
    assert_eq!(all(&named), Ok(()));
}

#[test]
fn group_names_are_printed_without_control_characters() {
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
