//! Effects of the training settings.

use candle_core::Tensor;
use distill::config::{BestMetric, ComputeDtype, Config, Device, LrSchedule, StudentInit};
use distill::exit::Exit;
use distill::model::weights::{self, Tensors};
use distill::train;
use distill::train::summary::StartMode;

use super::{metrics, run_folder, weights};
use crate::tiny;

fn tensors(config: &Config) -> Tensors {
    weights::load_file(&config.student_dir().join("model.safetensors")).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn freeze_keeps_matching_parameters_and_trains_the_others() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(0);
    train::run(&config, StartMode::New.into()).unwrap();
    let before = tensors(&config);
    config.train.steps = Some(3);
    config.train.freeze = ["embed_tokens", r"layers\.0\..*proj"]
        .map(|pattern| pattern.parse().unwrap())
        .into();
    train::run(&config, StartMode::New.into()).unwrap();
    for (name, after) in tensors(&config) {
        let is_frozen =
            name.contains("embed_tokens") || (name.contains("layers.0.") && name.contains("proj"));
        assert_eq!(
            values(&after) == values(&before[&name]),
            is_frozen,
            "{name}"
        );
    }
    config.train.freeze = vec!["".parse().unwrap()];
    let error = train::run(&config, StartMode::Fresh.into()).err().unwrap();
    assert!(
        format!("{error:#}").contains("leaves no parameter"),
        "{error:#}"
    );
    assert_eq!(Exit::code_of(&error), 2);
}

#[test]
fn early_stopping_saves_the_best_weights_and_ends_after_patience() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(400);
    config.train.schedule = LrSchedule::Constant;
    // The learning rate is too high to stay at the optimum.
    config.train.learning_rate = 5e-2;
    config.train.eval_every = 2;
    config.train.keep_checkpoints = 1;
    config.train.best = BestMetric::Ce;
    config.train.patience = 4;
    let summary = train::run(&config, StartMode::New.into()).unwrap();
    let validations: Vec<(u64, f64)> = metrics(&config)
        .iter()
        .filter(|line| line["split"] == "validation")
        .map(|line| {
            (
                line["step"].as_u64().unwrap(),
                line["means"]["ce"].as_f64().unwrap(),
            )
        })
        .collect();
    let (best, ce) = *validations
        .iter()
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .unwrap();
    assert_eq!(summary.best_step, Some(best));
    // Four validations, two steps apart, follow the best one.
    assert_eq!(summary.steps, best + 2 * 4);
    assert_eq!(summary.validation.ce, Some(ce));
    let checkpoint = config.run_dir.join(format!("checkpoints/step-{best:06}"));
    let best_weights = weights::load_file(&checkpoint.join("model.safetensors")).unwrap();
    let name = "model.embed_tokens.weight";
    assert_eq!(values(&tensors(&config)[name]), values(&best_weights[name]));
    // Resuming a finished run takes no further step.
    let resumed = train::run(&config, StartMode::Resume.into()).unwrap();
    assert_eq!(
        (resumed.steps, resumed.best_step),
        (summary.steps, Some(best))
    );
}

#[test]
fn ema_matches_its_formula_and_becomes_the_student() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(4);
    config.train.checkpoint_every = 1;
    config.train.keep_checkpoints = 9;
    config.train.ema_decay = 0.4;
    train::run(&config, StartMode::New.into()).unwrap();
    let name = "model.layers.1.mlp.down_proj.weight";
    let values_at = |step: u64| {
        let folder = config.run_dir.join(format!("checkpoints/step-{step:06}"));
        values(&weights::load_file(&folder.join("model.safetensors")).unwrap()[name])
    };
    let (_start_dir, mut start) = run_folder();
    start.train.steps = Some(0);
    train::run(&start, StartMode::New.into()).unwrap();
    let mut average = values(&tensors(&start)[name]);
    for step in 1..=4 {
        let decay = 0.4f64.min((1.0 + step as f64) / (10.0 + step as f64)) as f32;
        for (average, value) in average.iter_mut().zip(values_at(step)) {
            *average = decay * *average + (1.0 - decay) * value;
        }
    }
    assert_eq!(values(&tensors(&config)[name]), average);
    assert_ne!(values_at(4), average);
}

#[test]
fn weight_decay_skips_norms_and_no_decay_patterns() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(1);
    config.train.warmup_steps = 1;
    let run = |config: &Config| {
        train::run(config, StartMode::Fresh.into()).unwrap();
        tensors(config)
    };
    config.train.weight_decay = 0.0;
    let without_decay = run(&config);
    config.train.weight_decay = 0.5;
    config.train.no_decay = vec!["embed".parse().unwrap()];
    for (name, with_decay) in run(&config) {
        let is_excluded = name.contains("norm") || name.contains("embed");
        assert_eq!(
            values(&with_decay) == values(&without_decay[&name]),
            is_excluded,
            "{name}"
        );
    }
}

#[test]
fn bf16_reaches_the_accuracy_of_f32() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(60);
    config.train.dtype = ComputeDtype::F32;
    let full = train::run(&config, StartMode::New.into()).unwrap();
    let full_weights = weights(&config);
    config.train.dtype = ComputeDtype::Bf16;
    let error = train::run(&config, StartMode::Resume.into()).err().unwrap();
    assert!(format!("{error:#}").contains("have changed"), "{error:#}");
    let half = train::run(&config, StartMode::Fresh.into()).unwrap();
    assert!(weights(&config) != full_weights);
    for summary in [full, half] {
        assert!(summary.validation.token_accuracy.unwrap() > 0.95);
    }
}

/// After a loss or gradient that is NaN or infinite, no weight is updated, and no checkpoint is written.
#[test]
fn non_finite_loss_or_gradient_stops_before_the_update() {
    let scale = |tensors: &mut Tensors, name: &str, factor: f64| {
        let scaled = (&tensors[name] * factor).unwrap();
        tensors.insert(name.into(), scaled);
    };
    type Break = Box<dyn Fn(&mut Tensors)>;
    let cases: [(&str, Break); 3] = [
        (
            "loss",
            Box::new(move |tensors| scale(tensors, "model.layers.0.mlp.up_proj.weight", f64::NAN)),
        ),
        (
            "loss",
            Box::new(move |tensors| scale(tensors, "lm_head.weight", 1e38)),
        ),
        (
            // The logits have the usual size, but the head's weights make the gradient overflow.
            "gradient",
            Box::new(move |tensors| {
                let head = tensors["lm_head.weight"].sign().unwrap();
                tensors.insert("lm_head.weight".into(), (head * 3.3e38).unwrap());
                scale(tensors, "model.norm.weight", 1e-38);
            }),
        ),
    ];
    for (quantity, break_weights) in cases {
        let (_dir, mut config) = run_folder();
        config.student.init = StudentInit::Pretrained;
        config.train.micro_batch_size = 2;
        let mut tensors =
            weights::load_file(&config.student.path.join("model.safetensors")).unwrap();
        break_weights(&mut tensors);
        tiny::write_weights(&config.student.path, &tensors);
        let error = train::run(&config, StartMode::New.into()).err().unwrap();
        let message = format!("{error:#}");
        let expected = format!("the {quantity} of step 1 is not finite; nothing was updated");
        assert!(message.contains(&expected), "{message}");
        assert!(!config.run_dir.join("checkpoints").exists());
    }
    let (_dir, mut config) = run_folder();
    config.train.learning_rate = 1e30;
    config.train.max_grad_norm = 0.0;
    config.train.checkpoint_every = 1;
    let error = train::run(&config, StartMode::New.into()).err().unwrap();
    let message = format!("{error:#}");
    assert!(message.contains("step 2 is not finite"), "{message}");
    let first = config.run_dir.join("checkpoints/step-000001");
    assert!(first.exists() && !first.with_file_name("step-000002").exists());
}

#[test]
fn device_missing_from_the_build_is_refused() {
    let (_dir, mut config) = run_folder();
    for (device, built) in [
        (Device::Cuda, cfg!(feature = "cuda")),
        (Device::Metal, cfg!(feature = "metal")),
    ] {
        config.train.device = device;
        if !built {
            let error = train::run(&config, StartMode::New.into()).err().unwrap();
            assert!(format!("{error:#}").contains("--features"), "{error:#}");
            assert_eq!(Exit::code_of(&error), 2);
        }
    }
}

#[test]
fn settings_without_effect_are_refused() {
    let (_dir, mut config) = run_folder();
    let refused = |config: &Config| {
        let error = train::run(config, StartMode::Fresh.into()).unwrap_err();
        assert_eq!(Exit::code_of(&error), 2);
        format!("{error:#}")
    };
    config.train.freeze = vec!["nope".parse().unwrap()];
    assert!(refused(&config).contains("\"nope\" matches no parameter"));
    config.train.freeze.clear();
    config.train.best = BestMetric::Kl;
    assert!(refused(&config).contains("soft labels"));
    config.train.best = BestMetric::Ce;
    config.data.validation_share = 0.0;
    assert!(refused(&config).contains("data.validation_share"));
}
