//! Domains, their mappings, and the endpoints attached to them: what requests do (VIRTIO 1.3, section 5.13.6).
//!
//! Nothing waits here. A change of what an endpoint reaches gives a [`Ticket`]; who asked for it is told when all its tickets are done.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::IommuConfig;
use super::endpoint::{Endpoint, Mapping};
use super::wire::{MSI, Request, Status};
use crate::host::{MemoryRegion, Permission};

/// A change of what an endpoint (by its index) reaches, by its number there.
pub(super) type Ticket = (usize, u64);

/// A range of addresses, by its first and last byte.
type Range = (u64, u64);

/// What one MAP request made.
struct Mapped {
    last: u64,
    gpa: u64,
    permission: Permission,
}

impl Mapped {
    /// Whether an endpoint can do anything with it.
    fn reachable(&self) -> bool {
        self.permission.read || self.permission.write
    }

    fn mapping(&self, first: u64) -> Mapping {
        Mapping {
            iova: first,
            gpa: self.gpa,
            len: self.last - first + 1,
            permission: self.permission,
        }
    }
}

/// The range from the first to the last of these mappings that an endpoint can reach, if there are any.
fn hull<'a>(mappings: impl Iterator<Item = (&'a u64, &'a Mapped)>) -> Option<Range> {
    let mut reachable = mappings.filter(|(_, mapped)| mapped.reachable());
    let (&first, head) = reachable.next()?;
    Some((first, reachable.last().map_or(head.last, |(_, m)| m.last)))
}

struct Domain {
    bypass: bool,
    endpoints: Vec<usize>,
    /// By first address; they do not overlap. None where `bypass`.
    mappings: BTreeMap<u64, Mapped>,
}

struct Member {
    id: u32,
    endpoint: Arc<Endpoint>,
    domain: Option<u32>,
}

pub(super) struct Domains {
    page_size: u64,
    input_range_end: u64,
    max_domains: u32,
    max_mappings: usize,
    /// What devices may reach at all: gpa of the first and last byte, in order, regions that join made one.
    memory: Vec<Range>,
    members: Vec<Member>,
    domains: BTreeMap<u32, Domain>,
    /// Mappings of all domains.
    mapped: usize,
    /// Endpoints that are attached to no domain reach all memory.
    bypass: bool,
    write_only_readable: bool,
}

impl Domains {
    /// No endpoint and no domain. The configuration has been checked.
    pub(super) fn new(config: &IommuConfig, regions: &[MemoryRegion]) -> Self {
        let mut memory: Vec<Range> = regions
            .iter()
            .filter_map(|r| Some((r.gpa, r.gpa.checked_add(r.shared.len.checked_sub(1)?)?)))
            .collect();
        memory.sort_unstable();
        memory.dedup_by(|next, before| {
            let joins = before.1.checked_add(1) == Some(next.0);
            if joins {
                before.1 = next.1;
            }
            joins
        });
        Self {
            page_size: config.page_size,
            input_range_end: config.input_range_end,
            max_domains: config.max_domains,
            max_mappings: config.max_mappings,
            memory,
            members: Vec::new(),
            domains: BTreeMap::new(),
            mapped: 0,
            bypass: config.bypass,
            write_only_readable: config.write_only_readable,
        }
    }

    /// A new endpoint, attached to nothing.
    pub(super) fn add(&mut self, id: u32, endpoint: Arc<Endpoint>) {
        self.members.push(Member {
            id,
            endpoint,
            domain: None,
        });
        // Nobody waits: the guest does not run yet.
        self.enter(self.members.len() - 1, &mut Vec::new());
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    pub(super) fn endpoint(&self, index: usize) -> Option<&Arc<Endpoint>> {
        self.members.get(index).map(|member| &member.endpoint)
    }

    pub(super) fn endpoints(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.members.iter().map(|member| &member.endpoint)
    }

    /// The id of an endpoint, and whether it is attached to a domain.
    pub(super) fn identity(&self, index: usize) -> Option<(u32, bool)> {
        let member = self.members.get(index)?;
        Some((member.id, member.domain.is_some()))
    }

    pub(super) fn is_done(&self, tickets: &[Ticket]) -> bool {
        tickets.iter().all(|&(index, number)| {
            self.endpoint(index)
                .is_none_or(|endpoint| endpoint.is_done(number))
        })
    }

    /// How many mappings there are, in all domains.
    pub(super) fn mapped(&self) -> usize {
        self.mapped
    }

    /// Carries out one request. Where it fails, nothing has changed.
    pub(super) fn handle(&mut self, request: &Request, tickets: &mut Vec<Ticket>) -> Status {
        let result = match *request {
            Request::Attach {
                domain,
                endpoint,
                bypass,
            } => self.attach(domain, endpoint, bypass, tickets),
            Request::Detach { domain, endpoint } => self.detach(domain, endpoint, tickets),
            Request::Map {
                domain,
                first,
                last,
                gpa,
                mut permission,
            } => {
                permission.read |= permission.write && self.write_only_readable;
                let mapped = Mapped {
                    last,
                    gpa,
                    permission,
                };
                self.map(domain, first, mapped, tickets)
            }
            Request::Unmap {
                domain,
                first,
                last,
            } => self.unmap(domain, first, last, tickets),
            Request::Probe { endpoint } => self.find(endpoint).map(|_| ()),
        };
        result.err().unwrap_or(Status::Ok)
    }

    fn find(&self, id: u32) -> Result<usize, Status> {
        let index = self.members.iter().position(|member| member.id == id);
        index.ok_or(Status::NoEntry)
    }

    fn attach(
        &mut self,
        domain: u32,
        id: u32,
        bypass: bool,
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Status> {
        let index = self.find(id)?;
        if domain >= self.max_domains {
            return Err(Status::Range);
        }
        if let Some(there) = self.domains.get(&domain)
            && there.bypass != bypass
        {
            return Err(Status::Invalid);
        }
        if self.members[index].domain == Some(domain) {
            return Ok(());
        }
        self.leave(index, tickets);
        let joined = self.domains.entry(domain).or_insert_with(|| Domain {
            bypass,
            endpoints: Vec::new(),
            mappings: BTreeMap::new(),
        });
        joined.endpoints.push(index);
        self.members[index].domain = Some(domain);
        self.enter(index, tickets);
        Ok(())
    }

    fn detach(&mut self, domain: u32, id: u32, tickets: &mut Vec<Ticket>) -> Result<(), Status> {
        let index = self.find(id)?;
        if self.members[index].domain != Some(domain) {
            return Err(Status::Invalid);
        }
        self.leave(index, tickets);
        self.enter(index, tickets);
        Ok(())
    }

    fn map(
        &mut self,
        domain: u32,
        first: u64,
        mapped: Mapped,
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Status> {
        let last = mapped.last;
        let granule = self.page_size - 1;
        let (end, full) = (self.input_range_end, self.mapped >= self.max_mappings);
        let len = last.checked_sub(first).ok_or(Status::Invalid)?;
        if (first | mapped.gpa | last.wrapping_add(1)) & granule != 0 || last > end {
            return Err(Status::Range);
        }
        // Only shared memory can be shown to a device's back-end: a success without effect would hide a driver's mistake from it.
        let gpa_last = mapped.gpa.checked_add(len).ok_or(Status::Invalid)?;
        let fits = |&(start, end): &Range| start <= mapped.gpa && gpa_last <= end;
        let in_memory = self.memory.iter().any(fits);
        let domain = translating(&mut self.domains, domain)?;
        let below = domain.mappings.range(..=last).next_back();
        let overlaps = below.is_some_and(|(_, there)| there.last >= first);
        let reserved = first <= MSI.1 && MSI.0 <= last;
        if overlaps || reserved || !in_memory {
            return Err(Status::Invalid);
        }
        if full {
            return Err(Status::NoMemory);
        }
        let reachable = mapped.reachable().then(|| mapped.mapping(first));
        domain.mappings.insert(first, mapped);
        self.mapped += 1;
        let (Some(mapping), members) = (reachable, &self.members) else {
            return Ok(());
        };
        for &index in &domain.endpoints {
            tickets.push((index, members[index].endpoint.map(mapping)));
        }
        Ok(())
    }

    fn unmap(
        &mut self,
        domain: u32,
        first: u64,
        last: u64,
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Status> {
        if last < first {
            return Err(Status::Invalid);
        }
        let domain = translating(&mut self.domains, domain)?;
        let before = domain.mappings.range(..first).next_back();
        let end = domain.mappings.range(first..=last).next_back();
        if before.is_some_and(|(_, m)| m.last >= first) || end.is_some_and(|(_, m)| m.last > last) {
            return Err(Status::Range);
        }
        let gone = hull(domain.mappings.range(first..=last));
        let mut removed = 0;
        while let Some((&at, _)) = domain.mappings.range(first..=last).next() {
            domain.mappings.remove(&at);
            removed += 1;
        }
        self.mapped -= removed;
        let (Some(gone), members) = (gone, &self.members) else {
            return Ok(());
        };
        for &index in &domain.endpoints {
            hide(members, index, gone, tickets);
        }
        Ok(())
    }

    /// Lets an endpoint reach what it may where it is now.
    fn enter(&self, index: usize, tickets: &mut Vec<Ticket>) {
        let member = &self.members[index];
        let domain = member.domain.and_then(|id| self.domains.get(&id));
        // The last number stands for all before.
        let mut last = None;
        if domain.map_or(self.bypass, |domain| domain.bypass) {
            for &(start, end) in &self.memory {
                last = Some(member.endpoint.map(Mapping {
                    iova: start,
                    gpa: start,
                    len: end - start + 1,
                    permission: Permission::READ_WRITE,
                }));
            }
        } else {
            let mappings = domain.map(|domain| &domain.mappings).into_iter().flatten();
            for (&first, mapped) in mappings.filter(|(_, mapped)| mapped.reachable()) {
                last = Some(member.endpoint.map(mapped.mapping(first)));
            }
        }
        tickets.extend(last.map(|number| (index, number)));
    }

    /// Takes away all that an endpoint reaches, and detaches it; a domain that it was the last of ends.
    fn leave(&mut self, index: usize, tickets: &mut Vec<Ticket>) {
        let id = self.members[index].domain.take();
        let domain = id.and_then(|id| self.domains.get_mut(&id));
        let bypass = domain.as_ref().map_or(self.bypass, |domain| domain.bypass);
        let gone = if bypass {
            let ends = self.memory.first().zip(self.memory.last());
            ends.map(|(first, last)| (first.0, last.1))
        } else {
            domain
                .as_ref()
                .and_then(|domain| hull(domain.mappings.iter()))
        };
        if let Some(gone) = gone {
            hide(&self.members, index, gone, tickets);
        }
        if let (Some(domain), Some(id)) = (domain, id) {
            domain.endpoints.retain(|&other| other != index);
            if domain.endpoints.is_empty() {
                self.mapped -= domain.mappings.len();
                self.domains.remove(&id);
            }
        }
    }

    /// What endpoints that are attached to nothing reach from now on: all memory, or nothing.
    pub(super) fn set_bypass(&mut self, bypass: bool, tickets: &mut Vec<Ticket>) {
        if self.bypass == bypass {
            return;
        }
        let alone: Vec<_> = (0..self.members.len())
            .filter(|&index| self.members[index].domain.is_none())
            .collect();
        for &index in &alone {
            self.leave(index, tickets);
        }
        self.bypass = bypass;
        for index in alone {
            self.enter(index, tickets);
        }
    }

    /// Detaches every endpoint; no domain remains.
    pub(super) fn reset(&mut self, tickets: &mut Vec<Ticket>) {
        for index in 0..self.members.len() {
            if self.members[index].domain.is_some() {
                self.leave(index, tickets);
                self.enter(index, tickets);
            }
        }
    }
}

/// The domain that a MAP or UNMAP is for.
fn translating(domains: &mut BTreeMap<u32, Domain>, id: u32) -> Result<&mut Domain, Status> {
    let domain = domains.get_mut(&id).ok_or(Status::NoEntry)?;
    if domain.bypass {
        return Err(Status::Invalid);
    }
    Ok(domain)
}

fn hide(members: &[Member], index: usize, (first, last): Range, tickets: &mut Vec<Ticket>) {
    let number = members[index].endpoint.unmap(first, last - first + 1);
    tickets.push((index, number));
}
