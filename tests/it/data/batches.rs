//! The order of training.

use distill::data::batch::{Batches, Cursor};

#[test]
fn every_epoch_takes_each_example_once_in_another_order() {
    let mut batches = Batches::new(10, 4, 3, Cursor::default()).unwrap();
    let taken: Vec<usize> = (0..5).flat_map(|_| batches.next_step()).collect();
    let (first, second) = taken.split_at(10);
    for epoch in [first, second] {
        let mut sorted = epoch.to_vec();
        sorted.sort();
        assert_eq!(sorted, (0..10).collect::<Vec<_>>());
    }
    assert_ne!(first, second);
    let other = Batches::new(10, 10, 4, Cursor::default())
        .unwrap()
        .next_step();
    assert_ne!(first, other);
}

#[test]
fn resumed_batches_are_the_same() {
    let run = |batches: &mut Batches, steps: usize| -> Vec<Vec<usize>> {
        (0..steps).map(|_| batches.next_step()).collect()
    };
    let mut whole = Batches::new(7, 3, 5, Cursor::default()).unwrap();
    let expected = run(&mut whole, 12);
    for stop in 0..12 {
        let mut before = Batches::new(7, 3, 5, Cursor::default()).unwrap();
        run(&mut before, stop);
        let saved = serde_json::to_string(&before.cursor()).unwrap();
        let cursor = serde_json::from_str(&saved).unwrap();
        let mut after = Batches::new(7, 3, 5, cursor).unwrap();
        assert_eq!(run(&mut after, 12 - stop), expected[stop..]);
    }
    assert!(Batches::new(7, 3, 5, Cursor { epoch: 0, index: 8 }).is_err());
    assert!(Batches::new(0, 3, 5, Cursor::default()).is_err());
}
