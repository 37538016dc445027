//! What arrays are called: md(4), "Names", and what mdadm makes of the name in a superblock.

use super::Array;

/// Arrays without a number of their own are counted down from here.
const FIRST_FREE: u32 = 127;

/// Gives names and numbers to new arrays, in their order.
///
/// An array named `host:0` is `/dev/md0`; one named `host:root` is `/dev/md/root`, and gets a number from 127 down, as one
/// that has no name. A file `mdadm.conf` of the guest can say otherwise, which is not known here.
pub(super) fn give(known: &[Array], arrays: &mut [Array]) {
    let mut numbers: Vec<u32> = known.iter().map(|array| array.number).collect();
    let mut names: Vec<String> = known.iter().map(|array| array.name.clone()).collect();
    // Those that say a number come first.
    for array in arrays.iter_mut() {
        let said =
            if array.number == u32::MAX { short(&array.full_name).parse().ok() } else { Some(array.number) };
        array.number =
            said.filter(|number| *number < 1 << 20 && !numbers.contains(number)).unwrap_or(u32::MAX);
        numbers.push(array.number);
    }
    for array in arrays {
        if array.number == u32::MAX {
            array.number = free(&numbers);
            numbers.push(array.number);
        }
        let short = short(&array.full_name);
        let plain =
            short.is_empty() || short.bytes().all(|byte| byte.is_ascii_digit()) || short.contains('/');
        let wanted = if plain { format!("md{}", array.number) } else { format!("md/{short}") };
        let mut name = wanted.clone();
        for count in 0..=names.len() {
            if !names.contains(&name) {
                break;
            }
            name = format!("{wanted}_{count}");
        }
        names.push(name.clone());
        array.name = name;
    }
}

fn free(numbers: &[u32]) -> u32 {
    let taken = |number: &u32| numbers.contains(number);
    (0..=FIRST_FREE)
        .rev()
        .find(|number| !taken(number))
        .or_else(|| (FIRST_FREE..).find(|number| !taken(number)))
        .unwrap_or(0)
}

/// The name without the host that it was given on.
fn short(full: &str) -> &str {
    full.split_once(':').map_or(full, |(_, name)| name)
}

/// Whether a device of `/dev/` is an array.
pub(super) fn answers(array: &Array, device: &str) -> bool {
    if device == array.name || device == format!("md{}", array.number) {
        return true;
    }
    device.strip_prefix("md/").is_some_and(|name| {
        !name.is_empty()
            && (name == array.full_name
                || name == short(&array.full_name)
                || name == array.number.to_string())
    })
}
