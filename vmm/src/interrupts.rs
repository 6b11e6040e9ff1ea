//! Message-signalled interrupts over KVM irqfds and the GSI routing table.
//!
//! Each interrupt has one GSI from 24 up (0..23 stay with the PIC and the I/O APIC), whose route is its message. Its eventfds are
//! irqfds of that GSI while it has a message, and nobody's while it is masked: what is signalled then waits in the
//! eventfds' counters, and KVM looks at them when they become irqfds again.
#![allow(unsafe_code)] // poll(2), and a union of the KVM bindings

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use devices::host::{Interrupt, MsiMessage};
use devices::vhost_pci::MAX_QUEUES;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use log::warn;
use vmm_sys_util::eventfd::EventFd;

use crate::sys::{context, kvm, lock};

/// The first GSI that is not a pin.
const FIRST_GSI: u32 = 24;
/// How many message-signalled interrupts a VM can have.
pub const LIMIT: usize = 1024;
/// How many eventfds one interrupt can have: its own, and where the guest gives a vhost-pci device one vector for
/// everything, the kicks of all vhost-user queues and the calls of the two control queues.
const SOURCES: usize = 1 + MAX_QUEUES as usize + 2;

/// The GSI routing table of a VM.
pub struct Router {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

/// Index n is GSI `FIRST_GSI + n`.
#[derive(Default)]
struct Table {
    gsis: Vec<Gsi>,
}

#[derive(Clone, Copy, PartialEq)]
enum Gsi {
    Free,
    Unrouted,
    Routed(MsiMessage),
}

impl Router {
    /// For a VM that has its in-kernel interrupt controllers.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Router {
            vm,
            table: Mutex::default(),
        })
    }

    /// A new interrupt, masked. Fails beyond [`LIMIT`].
    pub fn interrupt(self: &Arc<Self>) -> io::Result<Arc<MsiInterrupt>> {
        let own = Arc::new(
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(|e| context("eventfd", e))?,
        );
        let mut table = lock(&self.table);
        let index = match table.gsis.iter().position(|g| *g == Gsi::Free) {
            Some(index) => index,
            None if table.gsis.len() < LIMIT => {
                table.gsis.push(Gsi::Free);
                table.gsis.len() - 1
            }
            None => {
                return Err(io::Error::new(
                    io::ErrorKind::QuotaExceeded,
                    format!("all {LIMIT} message-signalled interrupts of the VM are in use"),
                ));
            }
        };
        let gsi = FIRST_GSI + u32::try_from(index).map_err(io::Error::other)?;
        if let Some(entry) = table.gsis.get_mut(index) {
            *entry = Gsi::Unrouted;
        }
        drop(table);
        let state = State {
            connected: false,
            sources: vec![Arc::clone(&own)],
        };
        Ok(Arc::new(MsiInterrupt {
            router: Arc::clone(self),
            gsi,
            own,
            state: Mutex::new(state),
        }))
    }

    /// Sets one GSI's entry and hands KVM the whole table where the routes changed.
    fn set(&self, gsi: u32, new: Gsi) -> io::Result<()> {
        let mut table = lock(&self.table);
        let index = gsi
            .checked_sub(FIRST_GSI)
            .and_then(|i| usize::try_from(i).ok());
        let Some(entry) = index.and_then(|i| table.gsis.get_mut(i)) else {
            return Ok(());
        };
        let old = *entry;
        if old == new {
            return Ok(());
        }
        *entry = new;
        if !matches!(old, Gsi::Routed(_)) && !matches!(new, Gsi::Routed(_)) {
            return Ok(());
        }
        let result = table.install(&self.vm);
        if result.is_err()
            && let Some(entry) = index.and_then(|i| table.gsis.get_mut(i))
        {
            *entry = old;
        }
        result
    }
}

impl Table {
    fn install(&self, vm: &VmFd) -> io::Result<()> {
        let mut entries = pin_routes();
        for (gsi, entry) in (FIRST_GSI..).zip(&self.gsis) {
            if let Gsi::Routed(message) = entry {
                entries.push(msi_route(gsi, *message));
            }
        }
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| io::Error::other(format!("{e:?}")))?;
        vm.set_gsi_routing(&routing)
            .map_err(|e| kvm("KVM_SET_GSI_ROUTING", e))
    }
}

/// What KVM_CREATE_IRQCHIP routes by itself: GSIs 0..15 to the PICs, 0..23 to the I/O APIC.
fn pin_routes() -> Vec<kvm_irq_routing_entry> {
    let route = |gsi, irqchip, pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip.irqchip = irqchip;
        entry.u.irqchip.pin = pin;
        entry
    };
    let pic = (0..16u32).map(|gsi| match gsi {
        0..8 => route(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
        _ => route(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
    });
    pic.chain((0..FIRST_GSI).map(|gsi| route(gsi, KVM_IRQCHIP_IOAPIC, gsi)))
        .collect()
}

fn msi_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    let [high, low] = [message.address >> 32, message.address & 0xFFFF_FFFF]
        .map(|half| u32::try_from(half).unwrap_or(0));
    // SAFETY: every bit pattern is a valid `msi`; the entry was zeroed as a whole.
    let msi = unsafe { &mut entry.u.msi };
    msi.address_hi = high;
    msi.address_lo = low;
    msi.data = message.data;
    entry
}

/// One message-signalled interrupt.
pub struct MsiInterrupt {
    router: Arc<Router>,
    gsi: u32,
    own: Arc<EventFd>,
    /// Locked before the routing table, never after it.
    state: Mutex<State>,
}

struct State {
    /// The sources are irqfds.
    connected: bool,
    /// The interrupt's own eventfd first.
    sources: Vec<Arc<EventFd>>,
}

impl MsiInterrupt {
    fn assign(&self, source: &EventFd) -> io::Result<()> {
        self.router
            .vm
            .register_irqfd(source, self.gsi)
            .map_err(|e| match e.errno() {
                libc::EBUSY => io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    "the eventfd raises another interrupt already",
                ),
                _ => kvm("KVM_IRQFD", e),
            })
    }

    /// Fails where `source` is no eventfd; nothing happens where it is not assigned.
    fn deassign(&self, source: &EventFd) -> io::Result<()> {
        self.router
            .vm
            .unregister_irqfd(source, self.gsi)
            .map_err(|e| match e.errno() {
                libc::EINVAL => io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "the file descriptor is no eventfd",
                ),
                _ => kvm("KVM_IRQFD", e),
            })
    }

    fn disconnect(&self, state: &mut State) {
        for source in &state.sources {
            if let Err(error) = self.deassign(source) {
                warn!("interrupt {}: {error}", self.gsi);
            }
        }
        state.connected = false;
    }
}

impl Interrupt for MsiInterrupt {
    fn set_message(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut state = lock(&self.state);
        let Some(message) = message else {
            if state.connected {
                self.disconnect(&mut state);
            }
            return Ok(());
        };
        // The route stays in the table while the interrupt is masked, so that unmasking it is cheap.
        self.router.set(self.gsi, Gsi::Routed(message))?;
        if state.connected {
            return Ok(());
        }
        self.assign(&self.own)?;
        state.connected = true;
        for source in state.sources.iter().skip(1) {
            // The others may be a peer's, who could have handed over one eventfd twice: that is its own loss, and must
            // not silence who shares the interrupt with it.
            if let Err(error) = self.assign(source) {
                warn!("interrupt {}: {error}", self.gsi);
            }
        }
        Ok(())
    }

    fn attach(&self, source: &Arc<EventFd>) -> io::Result<()> {
        let mut state = lock(&self.state);
        if state.sources.iter().any(|s| Arc::ptr_eq(s, source)) {
            return Ok(());
        }
        if state.sources.len() >= SOURCES {
            return Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("the interrupt has {SOURCES} eventfds already"),
            ));
        }
        if state.connected {
            self.assign(source)?;
        } else {
            // Takes nothing away, but the kernel looks what kind of file it is.
            self.deassign(source)?;
        }
        state.sources.push(Arc::clone(source));
        Ok(())
    }

    fn detach(&self, source: &Arc<EventFd>) {
        let mut state = lock(&self.state);
        let Some(index) = state
            .sources
            .iter()
            .skip(1)
            .position(|s| Arc::ptr_eq(s, source))
        else {
            return;
        };
        let source = state.sources.swap_remove(index + 1);
        if state.connected
            && let Err(error) = self.deassign(&source)
        {
            warn!("interrupt {}: {error}", self.gsi);
        }
    }

    fn trigger(&self) {
        // It can only fail where the counter is full, and then a signal waits anyway.
        let _ = self.own.write(1);
    }

    fn pending(&self) -> bool {
        let state = lock(&self.state);
        if state.connected {
            return false;
        }
        let mut polled: Vec<libc::pollfd> = state
            .sources
            .iter()
            .map(|s| libc::pollfd {
                fd: s.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        let count = libc::nfds_t::try_from(polled.len()).unwrap_or(0);
        // SAFETY: the array has `count` entries, and a timeout of zero does not block.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), count, 0) };
        ready > 0 && polled.iter().any(|p| p.revents & libc::POLLIN != 0)
    }
}

impl Drop for MsiInterrupt {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        if state.connected {
            self.disconnect(&mut state);
        }
        drop(state);
        if let Err(error) = self.router.set(self.gsi, Gsi::Free) {
            warn!("interrupt {}: {error}", self.gsi);
        }
    }
}

#[cfg(test)]
mod tests;
