//! Whole VMs.
#![allow(unsafe_code)] // a signal to one thread

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::thread::JoinHandleExt;
use std::thread;
use std::time::Duration;

use devices::host::Files;
use devices::vhost_pci::{DEFAULT_MISS_TIMEOUT, VhostPciConfig};
use devices::vhost_user::SocketRole;
use devices::virtio_iommu::IommuConfig;
use devices::virtio_net::{DEFAULT_IOTLB_TIMEOUT, NetConfig, RingFeatures};

use crate::testing::{self, image, ram};
use crate::{Console, Error, Fault, Kernel, Outcome, Seccomp, VmConfig, run};

fn config(kernel: Kernel) -> VmConfig {
    // A clear line where there is no KVM.
    drop(testing::kvm());
    VmConfig {
        memory: ram(4 << 20),
        kernel,
        initrd: None,
        cmdline: "*".into(),
        affinity: Vec::new(),
        vcpus: 1,
        net: Vec::new(),
        taps: Vec::new(),
        disks: Vec::new(),
        rng: false,
        vhost_pci: Vec::new(),
        iommu: None,
        console: Console::Output,
        control: None,
        metrics: None,
        capture: None,
        // It would stay on the test's thread.
        seccomp: Seccomp::Off,
    }
}

/// A configuration with a control channel, and the other end of that.
fn controlled(kernel: Kernel) -> (VmConfig, BufReader<UnixStream>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    (
        VmConfig {
            control: Some(theirs.into()),
            ..config(kernel)
        },
        BufReader::new(ours),
    )
}

fn line(reader: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    line
}

#[test]
fn a_write_to_port_f4_ends_the_vm_with_that_code() {
    assert_eq!(
        run(config(image(testing::power_off()))).unwrap(),
        Outcome::PowerOff { code: 42 }
    );
}

#[test]
fn the_keyboard_controllers_reset_line_resets() {
    assert_eq!(
        run(config(image(testing::reset()))).unwrap(),
        Outcome::Reset
    );
}

#[test]
fn the_code_at_the_reset_vector_resets() {
    assert_eq!(
        run(config(image(testing::reset_vector()))).unwrap(),
        Outcome::Reset
    );
}

#[test]
fn soft_off_by_acpi_is_a_power_off_with_code_0() {
    assert_eq!(
        run(config(image(testing::soft_off()))).unwrap(),
        Outcome::PowerOff { code: 0 }
    );
}

#[test]
fn the_guest_finds_its_command_line() {
    assert_eq!(
        run(config(image(testing::first_of_cmdline()))).unwrap(),
        Outcome::PowerOff { code: b'*' }
    );
}

#[test]
fn a_triple_fault_is_an_error_that_says_so() {
    let error = run(config(image(testing::triple_fault()))).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Vcpu {
                id: 0,
                fault: Fault::TripleFault { .. }
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("triple fault"));
}

#[test]
fn a_signal_ends_a_guest_that_spins_and_the_signal_mask_is_put_back() {
    let (config, mut socket) = controlled(image(testing::spin()));
    let vm = thread::spawn(move || {
        let outcome = run(config);
        let blocked = vmm_sys_util::signal::get_blocked_signals().unwrap();
        (outcome, blocked)
    });
    // The answer says that the VM is up and the signals are blocked.
    socket.get_mut().write_all(b"vmm stats\n").unwrap();
    assert!(line(&mut socket).starts_with("{\"record\":\"vmm\","));
    // SAFETY: the thread has not been joined.
    unsafe { libc::pthread_kill(vm.as_pthread_t(), libc::SIGTERM) };
    let (outcome, blocked) = vm.join().unwrap();
    assert_eq!(outcome.unwrap(), Outcome::Signal(libc::SIGTERM));
    assert!(!blocked.contains(&libc::SIGTERM));
}

#[test]
fn lines_reach_the_guest_and_come_back_and_the_vmm_answers_its_own() {
    let (config, mut socket) = controlled(image(testing::echo()));
    let vm = thread::spawn(move || run(config));
    let long = "0123456789".repeat(50) + "\n";
    socket.get_mut().write_all(long.as_bytes()).unwrap();
    assert_eq!(line(&mut socket), long);
    socket.get_mut().write_all(b"vmm stats\n").unwrap();
    let stats = line(&mut socket);
    for part in [
        "\"vcpus\":[{\"tid\":",
        "\"io_in\":",
        "\"mmio_write\":0",
        "\"kvm\":{",
        "\"window\":{\"reads\":0,\"writes\":0,",
    ] {
        assert!(stats.contains(part), "{part}: {stats}");
    }
    socket.get_mut().write_all(b"vmm fly\n").unwrap();
    assert_eq!(
        line(&mut socket),
        "{\"record\":\"error\",\"what\":\"the VMM knows no command fly\"}\n"
    );
    socket.get_mut().write_all(b"q\n").unwrap();
    assert_eq!(line(&mut socket), "q\n");
    assert_eq!(vm.join().unwrap().unwrap(), Outcome::PowerOff { code: 7 });
    // Whole lines until the very end, then the end.
    assert_eq!(line(&mut socket), "");
}

#[test]
fn the_record_has_the_iommus_counters_where_there_is_one() {
    let (mut config, mut socket) = controlled(image(testing::spin()));
    config.iommu = Some(IommuConfig::default());
    let vm = thread::spawn(move || run(config));
    socket.get_mut().write_all(b"vmm stats\n").unwrap();
    let stats = line(&mut socket);
    assert!(stats.contains("],\"iommu\":{\"attach\":0,"), "{stats}");
    assert!(
        stats.contains("\"unmap_waiting_ns\":0},\"window\":{"),
        "{stats}"
    );
    // SAFETY: the thread has not been joined, and it blocks the signal (see above).
    unsafe { libc::pthread_kill(vm.as_pthread_t(), libc::SIGTERM) };
    assert_eq!(vm.join().unwrap().unwrap(), Outcome::Signal(libc::SIGTERM));
}

#[test]
fn an_iommu_has_the_page_size_of_the_memory_and_one_that_cannot_be_made_is_an_error() {
    let config = VmConfig {
        iommu: Some(IommuConfig {
            input_range_end: 0x1234,
            // Not asked for.
            page_size: 1,
            ..IommuConfig::default()
        }),
        ..config(image(testing::power_off()))
    };
    let error = run(config).unwrap_err().to_string();
    assert!(error.contains("virtio-iommu: "), "{error}");
    assert!(error.contains("a page of 0x1000 bytes"), "{error}");
}

#[test]
fn the_answer_of_the_vmm_does_not_split_a_line_of_the_guest() {
    let (config, mut socket) = controlled(image(testing::half_line()));
    let vm = thread::spawn(move || run(config));
    thread::sleep(Duration::from_millis(300));
    socket.get_mut().write_all(b"vmm stats\nx\n").unwrap();
    assert!(line(&mut socket).starts_with("{\"record\":\"vmm\""));
    assert_eq!(line(&mut socket), "abcd\n");
    assert_eq!(vm.join().unwrap().unwrap(), Outcome::PowerOff { code: 0 });
}

#[test]
fn a_vm_outlives_the_control_socket() {
    let (config, socket) = controlled(image(testing::spin()));
    let vm = thread::spawn(move || run(config));
    thread::sleep(Duration::from_millis(200));
    drop(socket);
    thread::sleep(Duration::from_millis(200));
    assert!(!vm.is_finished());
    // SAFETY: the thread has not been joined, and it blocks the signal (see above).
    unsafe { libc::pthread_kill(vm.as_pthread_t(), libc::SIGINT) };
    assert_eq!(vm.join().unwrap().unwrap(), Outcome::Signal(libc::SIGINT));
}

#[test]
fn several_vcpus_start_and_stop_though_only_one_runs() {
    let config = VmConfig {
        vcpus: 4,
        ..config(image(testing::power_off()))
    };
    assert_eq!(run(config).unwrap(), Outcome::PowerOff { code: 42 });
}

#[test]
fn a_core_that_is_not_there_is_named() {
    let config = VmConfig {
        affinity: vec![0, 1023],
        vcpus: 2,
        ..config(image(testing::power_off()))
    };
    let error = run(config).unwrap_err().to_string();
    assert!(
        error.contains("vCPU 1") && error.contains("core 1023"),
        "{error}"
    );
}

#[test]
fn a_contradictory_configuration_is_refused() {
    for (vcpus, affinity) in [(0, vec![]), (9, vec![]), (2, vec![0]), (1, vec![0, 0])] {
        let config = VmConfig {
            vcpus,
            affinity,
            ..config(image(testing::power_off()))
        };
        assert!(matches!(run(config), Err(Error::Config(_))));
    }
}

#[test]
fn a_vm_waits_for_its_back_end_and_leaves_no_socket_behind() {
    let directory = std::env::temp_dir();
    let path = |name: &str| directory.join(format!("vmm-{name}-{}", std::process::id()));
    let (net, peer) = (path("net"), path("peer"));
    let (mut config, mut socket) = controlled(image(testing::power_off()));
    config.net = vec![NetConfig {
        socket: net.clone(),
        role: SocketRole::Listen,
        queue_pairs: 1,
        queue_size: 256,
        rings: RingFeatures::default(),
        mac: [2, 0, 0, 0, 0, 1],
        iotlb_timeout: DEFAULT_IOTLB_TIMEOUT,
    }];
    config.vhost_pci = vec![VhostPciConfig {
        socket: peer.clone(),
        role: SocketRole::Listen,
        window: 64 << 30,
        queues: 2,
        uuid: [0; 16],
        miss_timeout: DEFAULT_MISS_TIMEOUT,
        files: Files::Sealed,
        inflight: true,
        log: false,
    }];
    let vm = thread::spawn(move || run(config));
    socket.get_mut().write_all(b"vmm stats\n").unwrap();
    let stats = line(&mut socket);
    assert!(
        stats.contains("\"io_out\":0,"),
        "the guest ran before the device had its back-end: {stats}"
    );
    assert!(net.exists() && peer.exists());
    // SAFETY: the thread has not been joined, and it blocks the signal (see above).
    unsafe { libc::pthread_kill(vm.as_pthread_t(), libc::SIGTERM) };
    assert_eq!(vm.join().unwrap().unwrap(), Outcome::Signal(libc::SIGTERM));
    assert!(!net.exists() && !peer.exists());
}

#[test]
fn a_device_that_cannot_be_made_is_named_by_its_socket() {
    let mut config = config(image(testing::power_off()));
    let socket = std::path::PathBuf::from("/nonexistent/directory/socket");
    config.vhost_pci = vec![VhostPciConfig {
        socket,
        role: SocketRole::Listen,
        window: 64 << 30,
        queues: 2,
        uuid: [0; 16],
        miss_timeout: DEFAULT_MISS_TIMEOUT,
        files: Files::Sealed,
        inflight: true,
        log: false,
    }];
    let error = run(config).unwrap_err().to_string();
    assert!(
        error.contains("vhost-pci device /nonexistent/directory/socket"),
        "{error}"
    );
}
