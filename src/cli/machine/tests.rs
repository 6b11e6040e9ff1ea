use super::*;
use crate::cli::{Cli, Command};
use clap::Parser;

fn config(args: &[&str]) -> Result<VmConfig, String> {
    let all = [&["vhost-pci", "run"], args].concat();
    match Cli::try_parse_from(all).unwrap().command {
        Command::Run(run) => run.config(&[0, 1, 5]).map_err(|error| error.to_string()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_defaults_are_those_of_the_help() {
    let config = config(&["--net", "socket=/n", "--vhost-pci", "socket=/v"]).unwrap();
    assert_eq!(config.memory.size, 256 << 20);
    assert!(!config.memory.prefault && matches!(config.memory.hugepages, HugePages::Off));
    assert_eq!((config.vcpus, config.affinity.len()), (1, 0));
    let net = &config.net[0];
    assert!(matches!(net.role, SocketRole::Connect));
    assert_eq!((net.queue_size, net.queue_pairs), (256, 1));
    assert_eq!(net.rings, RingFeatures::default());
    assert_eq!(net.mac, [2, 0x76, 0x70, 0, 0, 1]);
    let device = &config.vhost_pci[0];
    assert!(matches!(device.role, SocketRole::Listen));
    assert_eq!((device.window, device.queues), (64 << 30, 32));
    assert_eq!(device.uuid, [0; 16]);
    assert_eq!(config.cmdline, "work=both ms=3000");
    assert_eq!(net.iotlb_timeout, Duration::from_secs(1));
    assert_eq!(device.miss_timeout, Duration::from_millis(50));
    assert_eq!(device.files, Files::Sealed);
    assert!(config.iommu.is_none() && config.disks.is_empty() && !config.rng);
}

#[test]
fn an_iommu_is_there_when_it_is_asked_for_and_its_list_may_be_empty() {
    for args in [
        &["--iommu"][..],
        &["--iommu="],
        &["--iommu", "--net", "socket=/n"],
    ] {
        let iommu = config(args).unwrap().iommu.unwrap();
        assert_eq!(iommu.input_range_end, (64 << 30) - 1);
        assert_eq!((iommu.max_mappings, iommu.bypass), (16384, false));
        assert!(!iommu.write_only_readable);
        assert_eq!(iommu.max_domains, IommuConfig::default().max_domains);
    }
    let text = "range=1G,mappings=8,domains=2,bypass=on,write-only=readable";
    let iommu = config(&["--iommu", text]).unwrap().iommu.unwrap();
    assert_eq!(iommu.input_range_end, (1 << 30) - 1);
    assert_eq!((iommu.max_mappings, iommu.max_domains), (8, 2));
    assert!(iommu.bypass && iommu.write_only_readable);
}

#[test]
fn every_key_is_taken() {
    let config = config(&[
        "--memory",
        "size=1G,hugepages=2M,prefault=on",
        "--cpus",
        "count=2,affinity=5:0",
        "--net",
        "socket=/n,listen=on,mac=02:aa:bb:cc:dd:ee,size=1024,queues=16,iotlb-timeout=250",
        "--vhost-pci",
        "socket=/v,listen=off,window=1T,queues=4,miss-timeout=0,unsealed=on,uuid=00112233-4455-6677-8899-aabbccddeeff",
        "--disk",
        "path=/d,readonly=on",
        "--disk",
        "path=/e",
        "--rng",
        "--console",
        "output",
        "--capture",
        "f,frames=7,snaplen=96",
        "--cmdline",
        "work=sink verify=off",
    ])
    .unwrap();
    assert_eq!(config.memory.size, 1 << 30);
    assert!(config.memory.prefault && matches!(config.memory.hugepages, HugePages::Size2M));
    assert_eq!(config.affinity, [5, 0]);
    assert_eq!(config.net[0].mac, [2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee]);
    assert_eq!(config.net[0].queue_size, 1024);
    assert_eq!(config.net[0].queue_pairs, 16);
    assert!(matches!(config.net[0].role, SocketRole::Listen));
    assert!(matches!(config.vhost_pci[0].role, SocketRole::Connect));
    assert_eq!(config.vhost_pci[0].uuid[..4], [0x00, 0x11, 0x22, 0x33]);
    assert_eq!(config.vhost_pci[0].window, 1 << 40);
    assert_eq!(config.net[0].iotlb_timeout, Duration::from_millis(250));
    assert_eq!(config.vhost_pci[0].miss_timeout, Duration::ZERO);
    assert_eq!(config.vhost_pci[0].files, Files::Unsealed);
    let words = "work=sink verify=off capture=7 snaplen=96";
    assert_eq!(config.cmdline, words);
    assert_eq!(config.capture.unwrap().interface, "back-end");
    assert!(matches!(config.console, Console::Output));
}

#[test]
fn each_key_of_the_rings_turns_its_feature_and_no_other() {
    type Choose = fn(&mut RingFeatures) -> &mut bool;
    let keys: [(&str, Choose); 8] = [
        ("packed", |rings| &mut rings.packed),
        ("in-order", |rings| &mut rings.in_order),
        ("event-idx", |rings| &mut rings.event_idx),
        ("mrg-rxbuf", |rings| &mut rings.mrg_rxbuf),
        ("indirect", |rings| &mut rings.indirect),
        ("csum", |rings| &mut rings.csum),
        ("tso", |rings| &mut rings.tso),
        ("uso", |rings| &mut rings.uso),
    ];
    for (key, feature) in keys {
        for (value, on) in [("on", true), ("off", false)] {
            let text = format!("socket=/n,{key}={value}");
            let mut expected = RingFeatures::default();
            *feature(&mut expected) = on;
            assert_eq!(config(&["--net", &text]).unwrap().net[0].rings, expected);
        }
    }
}

#[test]
fn packed_rings_have_any_size_and_split_ones_powers_of_two() {
    let size = |text: &str| {
        let text = format!("socket=/n,{text}");
        config(&["--net", &text]).map(|config| config.net[0].queue_size)
    };
    assert_eq!(size("size=768,packed=on"), Ok(768));
    assert_eq!(size("packed=on,size=1"), Ok(1));
    assert_eq!(size("size=32768"), Ok(32768));
    assert_eq!(size("size=1"), Ok(1));
    assert_eq!(
        size("size=768").unwrap_err(),
        "--net: size=768: it is a power of two, or any number with packed=on"
    );
    for packed in ["on", "off"] {
        for number in ["0", "32769", "65536", "65792", "-1"] {
            let error = size(&format!("size={number},packed={packed}")).unwrap_err();
            let expected = format!("--net: size={number}: it is a number from 1 to 32768");
            assert_eq!(error, expected);
        }
    }
}

#[test]
fn each_bad_value_is_named_with_its_flag_and_key() {
    let cases: &[(&[&str], &str)] = &[
        (&["--memory", "size=0"], "--memory: size=0: "),
        (&["--memory", "size=4097"], "--memory: size=4097: "),
        (&["--memory", "size=3M,hugepages=2M"], "--memory: size=3M: "),
        (&["--memory", "hugepages=4M"], "--memory: hugepages=4M: "),
        (&["--memory", "prefault=yes"], "--memory: prefault=yes: "),
        (&["--cpus", "count=9"], "--cpus: count=9: "),
        (&["--cpus", "count=2,affinity=0"], "--cpus: affinity=0: "),
        (&["--cpus", "affinity=7"], "--cpus: affinity=7: "),
        (&["--net", "socket=a,mac=1:2"], "--net: mac=1:2: "),
        (&["--net", "socket=a,mac=03:00:00:00:00:00"], "--net: mac="),
        (&["--net", "socket=a,size=255"], "--net: size=255: "),
        (&["--net", "socket=a,packed=1"], "--net: packed=1: "),
        (
            &["--net", "socket=a,queues=17"],
            "--net: queues=17: it is a number from 1 to 16",
        ),
        (&["--net", "socket=a,queues=0"], "--net: queues=0: "),
        (
            &["--net", "socket=a,queue-size=256"],
            "--net: unknown key 'queue-size'",
        ),
        (&["--net", "size=256"], "--net: one of the keys 'socket'"),
        (&["--net", "socket=a,tap=b"], "--net: one of the keys"),
        (&["--net", "tap=a,queues=2"], "--net: a tap has one"),
        (&["--net", "tap=a/b"], "--net: tap=a/b: "),
        (&["--net", "tap=sixteen-letters-"], "--net: tap=sixteen"),
        (&["--net", "tap=a,vhost=on"], "--net: vhost=on: "),
        (&["--net", "socket=a,vhost=kernel"], "--net: vhost=kernel"),
        (&["--net", "tap=a", "--iommu"], "--net tap=a: a tap cannot"),
        (
            &["--vhost-pci", "listen=on"],
            "--vhost-pci: the key 'socket'",
        ),
        (
            &["--vhost-pci", "socket=a,window=3G"],
            "--vhost-pci: window=",
        ),
        (
            &["--vhost-pci", "socket=a,queues=0"],
            "--vhost-pci: queues=",
        ),
        (
            &["--vhost-pci", "socket=a,queues=257"],
            "--vhost-pci: queues=257: it is a number from 1 to 256",
        ),
        (&["--vhost-pci", "socket=a,uuid=+1"], "--vhost-pci: uuid="),
        (
            &["--vhost-pci", "socket=a,miss-timeout=60001"],
            "--vhost-pci: miss-timeout=60001: it is a number from 0 to 60000",
        ),
        (
            &["--net", "socket=a,iotlb-timeout=0"],
            "--net: iotlb-timeout=0: it is a number from 1 to 60000",
        ),
        (&["--metrics", "unix:"], "--metrics: there has to be FILE"),
        (&["--metrics", ""], "--metrics: there has to be FILE"),
        (
            &["--metrics", "m,format=prometheus"],
            "--metrics: m: format=prometheus needs unix:PATH",
        ),
        (&["--metrics", "m,format=x"], "--metrics: format=x: "),
        (&["--metrics", "m,interval=9"], "--metrics: interval=9: "),
        (&["--metrics", "m,x=9"], "--metrics: unknown key 'x'"),
        (&["--capture", "f,frames=0"], "--capture: frames=0: "),
        (&["--capture", "f", "--kernel", "k"], "--capture: it is the"),
        (&["--disk", ""], "--disk: the key 'path' is missing"),
        (
            &["--disk", "path=a,readonly=yes"],
            "--disk: readonly=yes: it is on or off",
        ),
        (&["--iommu", "range=3G"], "--iommu: range=3G: "),
        (&["--iommu", "mappings=0"], "--iommu: mappings=0: "),
        (&["--iommu", "domains=0"], "--iommu: domains=0: "),
        (&["--iommu", "bypass=1"], "--iommu: bypass=1: "),
        (
            &["--iommu", "write-only=on"],
            "--iommu: write-only=on: it is exact or readable",
        ),
        (&["--iommu", "on"], "--iommu: 'on' is not key=value"),
        (
            &["--net", "socket=a", "--vhost-pci", "socket=a"],
            "two devices",
        ),
    ];
    for (args, start) in cases {
        let error = config(args).err().unwrap_or_default();
        assert!(error.starts_with(start), "{args:?}: {error:?}");
    }
    let long = format!("socket=/{}", "x".repeat(107));
    assert!(config(&["--net", &long]).is_err());
}

#[test]
fn a_guest_that_is_told_what_to_do_is_not_told_otherwise() {
    assert_eq!(
        builtin_cmdline("size=128", true, false),
        "work=both ms=3000 size=128"
    );
    assert_eq!(builtin_cmdline("work=echo", true, false), "work=echo");
    assert_eq!(builtin_cmdline("", true, true), "");
    assert_eq!(builtin_cmdline("", false, false), "");
}

#[test]
fn two_different_cores_are_needed() {
    let args = |cores: Option<&str>| BothArgs {
        memory: String::new(),
        cores: cores.map(str::to_owned),
    };
    assert_eq!(args(None).cores(&[3, 4, 5]).unwrap(), [3, 4]);
    assert_eq!(args(Some("5:3")).cores(&[3, 4, 5]).unwrap(), [5, 3]);
    assert!(args(None).cores(&[3]).is_err());
    for bad in ["3", "3:3", "3:4:5", "3:9", "a:b", ""] {
        assert!(args(Some(bad)).cores(&[3, 4, 5]).is_err(), "{bad}");
    }
}
