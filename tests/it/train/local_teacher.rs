//! A teacher on this machine: dense soft labels, alone and trained along.

use distill::config::{ComputeDtype, Init, Kd};
use distill::data::groups::Selection;
use distill::exit::Exit;
use distill::model::{Input, Model};
use distill::train;
use distill::train::summary::StartMode;

use super::{metrics, run_folder};
use crate::tiny;

#[test]
fn a_student_comes_closer_to_the_whole_distribution() {
    let (_dir, mut config) = run_folder();
    config.teacher.local = Some(config.student.path.clone());
    config.train.steps = Some(80);
    config.train.eval_every = 80;
    let mut ends = Vec::new();
    for (kd, weight) in [(Kd::None, 0.5), (Kd::Tail, 1.0), (Kd::Temperature, 1.0)] {
        config.loss.kd = kd;
        config.loss.kd_weight = Some(weight);
        let summary = train::run(&config, StartMode::Fresh.into()).unwrap();
        let validation = summary.validation;
        if kd == Kd::None {
            assert!(validation.kl.is_none(), "{validation:?}");
            continue;
        }
        assert_eq!(validation.soft_positions, validation.positions);
        let first = metrics(&config)[0]["kl"].as_f64().unwrap();
        let last = validation.kl.unwrap();
        assert!(last < 0.5 * first, "{kd:?}: from {first} to {last}");
        ends.push(last);
    }
    assert!(ends[0] != ends[1]);
}

/// What the run says is what the two folders' own distributions say.
#[test]
fn the_divergence_that_is_told_is_that_of_the_models() {
    let (_dir, mut config) = run_folder();
    config.teacher.local = Some(config.student.path.clone());
    config.loss.kd = Kd::Auto;
    config.data.validation_share = 0.9;
    config.train.dtype = ComputeDtype::F32;
    config.train.steps = Some(3);
    let summary = train::run(&config, StartMode::New.into()).unwrap();
    let [teacher, student] =
        [&config.student.path, &config.student_dir()].map(|dir| Model::load(dir).unwrap());
    let tokenizer = distill::tokenizer::Tokenizer::load(&config.student.path).unwrap();
    let data =
        distill::data::dataset::load(&config, &Selection::All, &tokenizer, &mut |_, _| Ok(()))
            .unwrap();
    let (mut sum, mut count) = (0.0, 0);
    for example in data.validation().iter() {
        let batch = distill::data::batch::Batch::new([example]);
        let input = Input {
            input_ids: &batch.input_ids,
            segments: &batch.segments,
            positions: &batch.positions,
        };
        let of = |model: &Model| model.map_logits(input, |_, row| row.to_vec()).unwrap();
        for (student, teacher) in of(&student).iter().zip(&of(&teacher)) {
            // The student has no rows beyond the tokenizer's.
            let (p, q) = (log_softmax(&teacher[..student.len()]), log_softmax(student));
            sum += p
                .iter()
                .zip(&q)
                .map(|(p, q)| p.exp() * (p - q))
                .sum::<f64>();
            count += 1;
        }
    }
    let (told, expected) = (summary.validation.kl.unwrap(), sum / f64::from(count));
    assert!(
        (told - expected).abs() < 1e-4 * expected,
        "{told} and {expected}"
    );

    // A model differs in nothing from itself.
    config.student.init = Init::Pretrained;
    config.train.steps = Some(0);
    let summary = train::run(&config, StartMode::Fresh.into()).unwrap();
    let (kl, agreement) = (summary.validation.kl, summary.validation.teacher_agreement);
    assert!(kl.unwrap().abs() < 1e-6 && agreement == Some(1.0), "{kl:?}");
}

pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|z| f64::from(*z).exp()).sum();
    logits.iter().map(|z| f64::from(*z) - sum.ln()).collect()
}

#[test]
fn a_teacher_that_is_trained_along_learns_the_answers_and_is_written() {
    let (_dir, mut config) = run_folder();
    config.teacher.local = Some(config.student.path.clone());
    config.loss.kd = Kd::Tail;
    config.train.steps = Some(60);
    let alone = train::run(&config, StartMode::New.into()).unwrap();
    assert!(!config.run_dir.join("teacher").exists());
    config.teacher.cotrain = true;
    let error = train::run(&config, StartMode::Resume.into()).unwrap_err();
    assert!(format!("{error:#}").contains("have changed"), "{error:#}");
    let along = train::run(&config, StartMode::Fresh.into()).unwrap();
    let lines = metrics(&config);
    let ce = |line: usize| lines[line]["teacher_ce"].as_f64().unwrap();
    assert!(ce(59) < 0.1 * ce(0), "from {} to {}", ce(0), ce(59));
    let mut slow = config.clone();
    slow.run_dir = config.run_dir.with_file_name("slow");
    slow.teacher.cotrain_rate = 1e-6;
    train::run(&slow, StartMode::New.into()).unwrap();
    let last = metrics(&slow)[59]["teacher_ce"].as_f64().unwrap();
    assert!(last > 0.5 * ce(0), "from {} to {last}", ce(0));
    // A teacher of noise is in the way; one that learns is not.
    assert!(along.validation.ce.unwrap() < 0.5 * alone.validation.ce.unwrap());
    config.student.init = Init::Pretrained;
    config.student.path = config.run_dir.join("teacher");
    config.run_dir = config.run_dir.join("second");
    config.teacher.local = None;
    config.teacher.cotrain = false;
    config.loss.kd = Kd::None;
    config.train.steps = Some(0);
    let teacher = train::run(&config, StartMode::New.into()).unwrap();
    assert!(teacher.validation.token_accuracy.unwrap() > 0.95);
}

#[test]
fn a_teacher_with_another_tokenizer_is_refused() {
    let (dir, mut config) = run_folder();
    let teacher = dir.path().join("teacher");
    std::fs::create_dir(&teacher).unwrap();
    tiny::write_model(&teacher, 2, 128);
    let path = teacher.join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("<|endoftext|>", "<|end|>")).unwrap();
    config.teacher.local = Some(teacher);
    config.loss.kd = Kd::Tail;
    let error = train::run(&config, StartMode::New.into()).unwrap_err();
    let message = format!("{error:#}");
    assert_eq!(Exit::code_of(&error), 2, "{message}");
    assert!(
        message.contains("<|end|>") && message.contains("distill serve"),
        "{message}"
    );
}

/// It is taught on texts that nobody gave it, by a teacher that only judges.
#[test]
fn a_student_learns_from_what_it_writes_itself() {
    let (_dir, mut config) = run_folder();
    config.teacher.local = Some(config.student.path.clone());
    config.loss.kd = Kd::Tail;
    config.train.steps = Some(150);
    config.train.on_policy = true;
    config.on_policy.max_tokens = 8;
    for (share, kd, most) in [(1.0, Kd::ReverseKl, 0.85), (0.5, Kd::Jsd, 0.98)] {
        config.on_policy.share = share;
        config.on_policy.kd = kd;
        let summary = train::run(&config, StartMode::Fresh.into()).unwrap();
        let lines = metrics(&config);
        let mean = |lines: &[serde_json::Value]| {
            let judged = lines
                .iter()
                .map(|line| line["on_policy_kd"].as_f64().unwrap());
            judged.sum::<f64>() / lines.len() as f64
        };
        let (first, last) = (mean(&lines[..5]), mean(&lines[130..150]));
        assert!(last < most * first, "{kd:?}: from {first} to {last}");
        assert_eq!(lines[0]["ce"].is_null(), share == 1.0, "{}", lines[0]);
        assert!(summary.last_loss.is_finite());
    }
}
