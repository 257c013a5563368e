//! Local teachers, frozen and co-trained.

use anyhow::bail;
use distill::config::{ComputeDtype, KdMode, StudentInit};
use distill::exit::Exit;
use distill::model::{Model, ModelInput, SourceInput};
use distill::train;
use distill::train::objective;
use distill::train::summary::StartMode;

use super::{metrics, run_folder};
use crate::tiny;

#[test]
fn local_teacher_training_halves_the_kl_divergence() {
    let (_dir, mut config) = run_folder();
    config.teacher.local = Some(config.student.path.clone());
    config.train.steps = Some(80);
    config.train.eval_every = 80;
    let mut last_kls = Vec::new();
    for (kd, weight) in [
        (KdMode::None, 0.5),
        (KdMode::Tail, 1.0),
        (KdMode::Temperature, 1.0),
    ] {
        config.loss.kd = kd;
        config.loss.kd_weight = Some(weight);
        let summary = train::run(&config, StartMode::Fresh.into()).unwrap();
        let validation = summary.validation;
        if kd == KdMode::None {
            assert!(validation.kl.is_none(), "{validation:?}");
            let card = std::fs::read_to_string(config.student_dir().join("README.md")).unwrap();
            assert!(card.contains("- teacher: none"), "{card}");
            continue;
        }
        assert_eq!(validation.soft_positions, validation.positions);
        let first = metrics(&config)[0]["kl"].as_f64().unwrap();
        let last = validation.kl.unwrap();
        assert!(last < 0.5 * first, "{kd:?}: from {first} to {last}");
        last_kls.push(last);
    }
    assert!(last_kls[0] != last_kls[1]);
    let card = std::fs::read_to_string(config.student_dir().join("README.md")).unwrap();
    assert!(card.contains("/model\n- loss"), "{card}");
}

#[test]
fn reported_kl_equals_the_kl_of_both_models() {
    let (_dir, mut config) = run_folder();
    config.teacher.local = Some(config.student.path.clone());
    config.loss.kd = KdMode::Auto;
    config.data.validation_share = 0.9;
    config.train.dtype = ComputeDtype::F32;
    config.train.steps = Some(3);
    let summary = train::run(&config, StartMode::New.into()).unwrap();
    let [teacher, student] =
        [&config.student.path, &config.student_dir()].map(|dir| Model::load(dir).unwrap());
    let tokenizer = distill::tokenizer::Tokenizer::load(&config.student.path).unwrap();
    let data = crate::data::dataset::load(&config, &tokenizer).unwrap();
    let stopped = objective::evaluate(&student, data.validation(), 2, || bail!(Exit::Signal(2)));
    assert_eq!(Exit::code_of(&stopped.unwrap_err()), 130);
    let mut sum = 0.0;
    let mut count = 0;
    for example in data.validation().iter() {
        let batch = distill::data::batch::Batch::new([example]);
        let input = ModelInput {
            input_ids_T: &batch.input_ids_T,
            segments_B: &batch.segments_B,
            positions_N: &batch.positions_N,
            source: SourceInput {
                ids_U: &batch.source_ids_U,
                segments_B: &batch.source_segments_B,
            },
        };
        let logits = |model: &Model| model.map_logits(input, |_, row| row.to_vec()).unwrap();
        for (student, teacher) in logits(&student).iter().zip(&logits(&teacher)) {
            // The student's vocabulary is not padded.
            let p = log_softmax(&teacher[..student.len()]);
            let q = log_softmax(student);
            let terms = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q));
            sum += terms.sum::<f64>();
            count += 1;
        }
    }
    let reported = summary.validation.kl.unwrap();
    let expected = sum / f64::from(count);
    assert!(
        (reported - expected).abs() < 1e-4 * expected,
        "{reported} is reported instead of {expected}"
    );

    // A student equal to its teacher has a divergence of 0.
    config.student.init = StudentInit::Pretrained;
    config.train.steps = Some(0);
    let summary = train::run(&config, StartMode::Fresh.into()).unwrap();
    let kl = summary.validation.kl.unwrap();
    assert!(kl.abs() < 1e-6, "{kl}");
    assert_eq!(summary.validation.teacher_agreement, Some(1.0));
}

pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|z| f64::from(*z).exp()).sum();
    logits.iter().map(|z| f64::from(*z) - sum.ln()).collect()
}

#[test]
fn cotrained_teacher_learns_the_answers_and_is_saved() {
    let (_dir, mut config) = run_folder();
    config.teacher.local = Some(config.student.path.clone());
    config.loss.kd = KdMode::Tail;
    config.train.steps = Some(60);
    let with_frozen_teacher = train::run(&config, StartMode::New.into()).unwrap();
    assert!(!config.run_dir.join("teacher").exists());
    config.teacher.cotrain = true;
    let error = train::run(&config, StartMode::Resume.into()).unwrap_err();
    assert!(format!("{error:#}").contains("have changed"), "{error:#}");
    let with_cotrained_teacher = train::run(&config, StartMode::Fresh.into()).unwrap();
    let lines = metrics(&config);
    let ce = |line: usize| lines[line]["teacher_ce"].as_f64().unwrap();
    assert!(ce(59) < 0.1 * ce(0), "from {} to {}", ce(0), ce(59));
    let mut slow = config.clone();
    slow.run_dir = config.run_dir.with_file_name("slow");
    slow.teacher.cotrain_rate = 1e-6;
    train::run(&slow, StartMode::New.into()).unwrap();
    let last = metrics(&slow)[59]["teacher_ce"].as_f64().unwrap();
    assert!(last > 0.5 * ce(0), "from {} to {last}", ce(0));
    // The frozen teacher has random weights, so its soft labels do not help the student.
    let frozen_ce = with_frozen_teacher.validation.ce.unwrap();
    assert!(with_cotrained_teacher.validation.ce.unwrap() < 0.5 * frozen_ce);
    config.student.init = StudentInit::Pretrained;
    config.student.path = config.run_dir.join("teacher");
    config.run_dir = config.run_dir.join("second");
    config.teacher.local = None;
    config.teacher.cotrain = false;
    config.loss.kd = KdMode::None;
    config.train.steps = Some(0);
    let teacher = train::run(&config, StartMode::New.into()).unwrap();
    assert!(teacher.validation.token_accuracy.unwrap() > 0.95);
}

#[test]
fn local_teacher_with_another_tokenizer_is_refused() {
    let (dir, mut config) = run_folder();
    let teacher = dir.path().join("teacher");
    std::fs::create_dir(&teacher).unwrap();
    tiny::write_model(&teacher, 2, 128);
    let path = teacher.join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("<|endoftext|>", "<|end|>")).unwrap();
    config.teacher.local = Some(teacher);
    config.loss.kd = KdMode::Tail;
    let error = train::run(&config, StartMode::New.into()).unwrap_err();
    let message = format!("{error:#}");
    assert_eq!(Exit::code_of(&error), 2, "{message}");
    assert!(
        message.contains("<|end|>") && message.contains("distill serve"),
        "{message}"
    );
}

/// An empty `teacher.local` is the folder of the config file, which is not a model.
#[test]
fn local_teacher_that_is_not_a_model_folder_is_refused_with_setting_and_folder() {
    let (dir, mut config) = run_folder();
    config.teacher.local = Some(dir.path().join(""));
    config.loss.kd = KdMode::Tail;
    let error = train::run(&config, StartMode::New.into()).unwrap_err();
    let message = format!("{error:#}");
    assert_eq!(Exit::code_of(&error), 2, "{message}");
    for expected in ["set `teacher.local` to", dir.path().to_str().unwrap()] {
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn on_policy_training_with_a_local_teacher_lowers_the_divergence() {
    let (_dir, mut config) = run_folder();
    config.teacher.local = Some(config.student.path.clone());
    config.loss.kd = KdMode::Tail;
    config.train.steps = Some(150);
    config.train.on_policy = true;
    config.on_policy.max_tokens = 8;
    for (share, kd, max_ratio) in [(1.0, KdMode::ReverseKl, 0.85), (0.5, KdMode::Jsd, 0.98)] {
        config.on_policy.share = share;
        config.on_policy.kd = kd;
        let summary = train::run(&config, StartMode::Fresh.into()).unwrap();
        let lines = metrics(&config);
        let mean = |lines: &[serde_json::Value]| {
            let divergences = lines
                .iter()
                .map(|line| line["on_policy_kd"].as_f64().unwrap());
            divergences.sum::<f64>() / lines.len() as f64
        };
        let first = mean(&lines[..5]);
        let last = mean(&lines[130..150]);
        assert!(last < max_ratio * first, "{kd:?}: from {first} to {last}");
        assert_eq!(lines[0]["ce"].is_null(), share == 1.0, "{}", lines[0]);
        assert!(summary.last_loss.is_finite());
    }
}
