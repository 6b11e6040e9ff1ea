//! Who is told of what, and when.

use super::*;

layouts! {

fn notification_flags_are_obeyed_both_ways<L>() {
    let memory = fake();
    let (mut driver, mut device) = pair::<L>(&memory, &config::<L>(8), L::start(8, 1));
    let round = |driver: &mut L::Driver<_>, device: &mut L::Device<_>| {
        driver.add(&[buffer(0, true)]).unwrap();
        let kick = driver.publish();
        for (chain, _) in get(device, 8) {
            device.put(chain.id, 0);
        }
        let call = device.publish();
        take(driver, 8);
        (kick, call)
    };
    assert_eq!(round(&mut driver, &mut device), (true, true));
    device.disable_kicks();
    assert_eq!(round(&mut driver, &mut device), (false, true));
    driver.disable_calls();
    assert_eq!(round(&mut driver, &mut device), (false, false));
    memory.stores();
    driver.disable_calls();
    device.disable_kicks();
    assert_eq!(memory.stores(), [], "disabled already");
    assert!(!device.enable_kicks());
    assert_eq!(memory.stores().len(), 1);
    assert_eq!(round(&mut driver, &mut device), (true, false));
    memory.stores();
    assert!(!driver.enable_calls());
    assert_eq!(memory.stores().len(), 1);
    assert_eq!(round(&mut driver, &mut device), (true, true));
}

fn event_positions_ask_for_one_notification<L>() {
    for size in [8, 9] {
        if L::area_sizes(size).is_none() {
            continue;
        }
        for before in 1..=size {
            let config = RingConfig { event_idx: true, ..config::<L>(size) };
            let memory = fake();
            let (mut driver, mut device) = pair::<L>(&memory, &config, L::start(size, before));
            let add = |driver: &mut L::Driver<_>| {
                driver.add(&[buffer(0, true)]).unwrap();
                driver.publish()
            };
            // The first chain passes the event, the others do not.
            assert_eq!([(); 3].map(|()| add(&mut driver)), [true, false, false]);
            assert!(device.enable_kicks(), "three are there");
            let got = get(&mut device, 3);
            // The event that was asked for is behind the position.
            assert!(!add(&mut driver));
            assert!(device.enable_kicks());
            get(&mut device, 3);
            assert!(!device.enable_kicks());
            assert!(add(&mut driver));
            device.disable_kicks();
            assert!(!add(&mut driver));

            for (chain, _) in &got {
                device.put(chain.id, 0);
            }
            assert!(device.publish());
            assert!(driver.enable_calls(), "three are there");
            assert_eq!(take(&mut driver, 8).len(), 3);
            assert!(!driver.enable_calls());
            driver.disable_calls();
            for (chain, _) in get(&mut device, 1) {
                device.put(chain.id, 0);
            }
            assert!(!device.publish());
            assert_eq!(take(&mut driver, 8).len(), 1);
            assert!(!driver.enable_calls());
            for (chain, _) in get(&mut device, 1) {
                device.put(chain.id, 0);
            }
            assert!(device.publish());
        }
    }
}

fn an_event_in_the_middle_of_a_batch_or_of_a_chain_is_passed<L>() {
    for size in [16, 13] {
        if L::area_sizes(size).is_none() {
            continue;
        }
        for in_order in [false, true] {
            for before in 1..=size {
                let config = RingConfig { event_idx: true, in_order, ..config::<L>(size) };
                let memory = fake();
                let (mut driver, mut device) = pair::<L>(&memory, &config, L::start(size, before));
                for _ in 0..8 {
                    // The device asks for the second chain, and misses the first; then two chains of three come at once.
                    let long = [buffer(0, false); 3];
                    assert!(!device.enable_kicks());
                    driver.add(&long).unwrap();
                    driver.add(&long).unwrap();
                    assert!(driver.publish());
                    driver.add(&long).unwrap();
                    assert!(!driver.publish());
                    let got: Vec<_> = get(&mut device, 9).iter().map(|(chain, _)| *chain).collect();
                    assert_eq!(got.len(), 3);
                    assert!(!driver.enable_calls());
                    // In order one element stands for two chains, whose other descriptors it skips.
                    device.put_read(&got[..2]);
                    assert!(device.publish());
                    device.put_read(&got[2..]);
                    assert!(!device.publish());
                    assert!(driver.enable_calls());
                    assert_eq!(take(&mut driver, 9).len(), 3);
                    assert_eq!(driver.free(), size);
                    memory.stores();
                    memory.loads();
                }
            }
        }
    }
}

fn disabled_events_stay_quiet_for_a_whole_turn<L>() {
    let config = RingConfig { event_idx: true, ..config::<L>(256) };
    let memory = fake();
    let (mut driver, mut device) = pair::<L>(&memory, &config, L::start(256, 1000));
    driver.disable_calls();
    device.disable_kicks();
    for _ in 0..255 {
        for n in 0..256 {
            driver.add(&[buffer(n, true)]).unwrap();
        }
        assert!(!driver.publish());
        for (chain, _) in get(&mut device, 256) {
            device.put(chain.id, 0);
        }
        assert!(!device.publish());
        assert_eq!(take(&mut driver, 256).len(), 256);
        memory.stores();
        memory.loads();
    }
}

}
