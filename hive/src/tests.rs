//! Hives against a model, damage, and logs.

use std::collections::BTreeMap;

use block::testing::Random;

use crate::cells::{le32, put, put32};
use crate::log::marvin;
use crate::{Hive, Value};

/// Keys by their paths with their values.
type Model = BTreeMap<String, BTreeMap<String, Value>>;

fn model_of(hive: &Hive) -> Model {
    let mut model = Model::new();
    hive.walk(&mut |path, key| {
        let values = hive.values(key).unwrap().into_iter();
        model.insert(path.to_owned(), values.collect());
    })
    .unwrap();
    model
}

fn byte(random: &mut Random) -> usize {
    let mut one = [0];
    random.fill(&mut one);
    one[0].into()
}

#[test]
fn what_is_set_is_found() {
    let mut random = Random::new(11);
    for round in 0..20 {
        let mut hive = Hive::empty();
        let mut model = Model::from([(String::new(), BTreeMap::new())]);
        for _ in 0..300 {
            let depth = 1 + byte(&mut random) % 4;
            let names: Vec<_> = (0..depth).map(|_| format!("Key{}\u{e4}", byte(&mut random) % 9)).collect();
            let path = names.join("\\");
            for depth in 1..=depth {
                model.entry(names[..depth].join("\\")).or_default();
            }
            let asked = if byte(&mut random).is_multiple_of(2) { path.to_uppercase() } else { path.clone() };
            let key = hive.create(&asked).unwrap();
            let mut data = vec![0; byte(&mut random) % 12 * 17];
            random.fill(&mut data);
            let name = format!("Value{}", byte(&mut random) % 5);
            let value = Value::binary(data);
            hive.set(key, &name, &value).unwrap();
            // Whoever makes a key decides on its case; here everything is asked for in one of two.
            let own = model.get_mut(&path).unwrap();
            own.insert(name, value);
            if round % 4 == 0 {
                hive = Hive::parse(hive.into_bytes()).unwrap();
            }
        }
        let fold = |model: Model| -> Model {
            model.into_iter().map(|(path, values)| (path.to_uppercase(), values)).collect()
        };
        let hive = Hive::parse(hive.into_bytes()).unwrap();
        assert_eq!(fold(model_of(&hive)), fold(model));
    }
}

#[test]
fn many_keys_make_lists_of_lists_in_order() {
    let mut hive = Hive::empty();
    for index in 0..1300 {
        hive.create(&format!("Services\\svc{:04}", index * 7919 % 1300)).unwrap();
    }
    let hive = Hive::parse(hive.into_bytes()).unwrap();
    let services = hive.find("services").unwrap().unwrap();
    let names: Vec<_> =
        hive.subkeys(services).unwrap().into_iter().map(|key| hive.name(key).unwrap()).collect();
    let sorted: Vec<_> = (0..1300).map(|index| format!("svc{index:04}")).collect();
    assert_eq!(names, sorted);
    // Every key counts as a user of the one descriptor.
    let security = le32(hive.key(services).unwrap(), 44);
    assert_eq!(le32(hive.cell(security).unwrap(), 12), 1302);
}

#[test]
fn nothing_changes_if_everything_is_there() {
    let mut hive = Hive::empty();
    let key = hive.create("a\\b").unwrap();
    hive.set(key, "text", &Value::text("one")).unwrap();
    hive.set(key, "list", &Value::list(["a", "b"])).unwrap();
    let mut bytes = hive.into_bytes();
    // What follows the bins is nobody's business, and stays.
    bytes.extend([7; 4096]);
    let mut again = Hive::parse(bytes.clone()).unwrap();
    let key = again.create("A\\B").unwrap();
    again.set(key, "TEXT", &Value::text("one")).unwrap();
    assert!(!again.is_changed());
    assert_eq!(again.value(key, "list").unwrap().unwrap().as_list().unwrap(), ["a", "b"]);
    assert!(again.into_bytes() == bytes);
    let mut third = Hive::parse(bytes).unwrap();
    third.set(key, "text", &Value::number(5)).unwrap();
    let third = Hive::parse(third.into_bytes()).unwrap();
    assert_eq!(third.value(key, "text").unwrap().unwrap().as_number(), Some(5));
}

#[test]
fn damage_never_panics() {
    let mut hive = Hive::empty();
    for index in 0..40 {
        let key = hive.create(&format!("k{}\\l{index}", index % 5)).unwrap();
        hive.set(key, "v", &Value::text(&"x".repeat(index))).unwrap();
    }
    let whole = hive.into_bytes();
    let mut random = Random::new(5);
    for _ in 0..3000 {
        let mut bytes = whole.clone();
        for _ in 0..1 + byte(&mut random) % 3 {
            let at = (byte(&mut random) << 8 | byte(&mut random)) * 2 % bytes.len();
            bytes[at] = u8::try_from(byte(&mut random)).unwrap();
        }
        if let Ok(mut hive) = Hive::parse(bytes) {
            let _ = hive.walk(&mut |_, key| drop((hive.values(key), hive.name(key))));
            if let Ok(key) = hive.create("k1\\l1\\new") {
                let _ = hive.set(key, "v", &Value::number(1));
            }
            let _ = Hive::parse(hive.into_bytes());
        }
    }
    Hive::parse(whole[..5000].to_vec()).unwrap_err();
    Hive::parse(b"regf".to_vec()).unwrap_err();
}

/// A log with one entry that brings the bins of `new`.
fn log(new: &Hive, sequence: u32) -> Vec<u8> {
    let bins = &new.bins;
    let len = (48 + bins.len()).next_multiple_of(512);
    let mut entry = vec![0; len];
    put(&mut entry, 0, b"HvLE");
    let size = u32::try_from(bins.len()).unwrap();
    for (at, value) in [(4, u32::try_from(len).unwrap()), (12, sequence), (16, size), (20, 1), (44, size)] {
        put32(&mut entry, at, value);
    }
    put(&mut entry, 48, bins);
    let pages = marvin(&entry[40..]);
    put(&mut entry, 24, &pages.to_le_bytes());
    let head = marvin(&entry[..32]);
    put(&mut entry, 32, &head.to_le_bytes());
    let mut log = vec![0; 512];
    put(&mut log, 0, b"regf");
    log.extend(entry);
    log
}

#[test]
fn logs_are_applied_or_refused() {
    let old = Hive::empty();
    let mut new = old.clone();
    let key = new.create("late").unwrap();
    new.set(key, "v", &Value::number(9)).unwrap();
    let mut dirty = old;
    put32(&mut dirty.base, 4, 2);
    dirty.close();
    let dirty = dirty.into_bytes();
    let open = || {
        let hive = Hive::parse(dirty.clone()).unwrap();
        assert!(!hive.is_clean());
        hive
    };
    let good = log(&new, 1);
    let mut hive = open();
    hive.recover(&[&[], &good]).unwrap();
    assert!(hive.is_clean());
    let hive = Hive::parse(hive.into_bytes()).unwrap();
    let key = hive.find("late").unwrap().unwrap();
    assert_eq!(hive.value(key, "v").unwrap().unwrap().as_number(), Some(9));
    // Another sequence, damage, nothing at all.
    let mut bad = good.clone();
    bad[700] ^= 1;
    for logs in [vec![&log(&new, 4)[..]], vec![&bad[..]], vec![]] {
        let error = open().recover(&logs).unwrap_err();
        assert!(error.to_string().contains("not closed properly"), "{error}");
    }
}
