//! A port whose frames somebody else sees too, on their way: for captures. It costs those a copy more; a port that is not watched is not behind one of these.

use core::ops::DerefMut;

use virtqueue::net::Header;

use crate::port::{Error, Frame, Notices, Offloads, Port, Slot};

/// Who sees the frames of a port.
pub trait Watch {
    /// A frame came from the peer.
    fn came(&mut self, frame: &Frame);
    /// A frame of `len` bytes goes to the peer: has it built in memory of its own, and returns it.
    fn goes(&mut self, len: usize, build: impl FnOnce(&mut Slot)) -> &[u8];
    /// The burst is over. Where it is not `whole`, its frames did not go, or may not be what the peer sent ([`Port::whole`]).
    fn end(&mut self, whole: bool);
}

impl<W: Watch> Watch for &mut W {
    fn came(&mut self, frame: &Frame) {
        (**self).came(frame);
    }

    fn goes(&mut self, len: usize, build: impl FnOnce(&mut Slot)) -> &[u8] {
        (**self).goes(len, build)
    }

    fn end(&mut self, whole: bool) {
        (**self).end(whole);
    }
}

/// A port, and who sees its frames.
#[derive(Debug)]
pub struct Watched<P, W> {
    /// The port: a reference, or something like it.
    pub port: P,
    /// Who sees them.
    pub watch: W,
}

impl<P: DerefMut<Target: Port + Sized>, W: Watch> Watched<P, W> {
    fn sent(&mut self, sent: Result<usize, Error>) -> Result<usize, Error> {
        self.watch.end(sent.is_ok());
        sent
    }
}

impl<P: DerefMut<Target: Port + Sized>, W: Watch> Port for Watched<P, W> {
    fn tx_burst(
        &mut self,
        count: usize,
        len: usize,
        mut build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        let Self { port, watch } = self;
        let sent = port.tx_burst(count, len, |number, slot| {
            slot.write(0, watch.goes(slot.len(), |own| build(number, own)));
        });
        self.sent(sent)
    }

    fn offloads(&self) -> Offloads {
        self.port.offloads()
    }

    fn rx_room(&self) -> usize {
        self.port.rx_room()
    }

    fn tx_offloaded(
        &mut self,
        header: &Header,
        count: usize,
        len: usize,
        mut build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        let Self { port, watch } = self;
        let sent = port.tx_offloaded(header, count, len, |number, slot| {
            slot.write(0, watch.goes(slot.len(), |own| build(number, own)));
        });
        self.sent(sent)
    }

    fn rx_burst(&mut self, count: usize, mut receive: impl FnMut(&Frame)) -> Result<usize, Error> {
        let Self { port, watch } = self;
        let received = port.rx_burst(count, |frame| {
            watch.came(frame);
            receive(frame);
        });
        let whole = received.is_ok_and(|received| received == 0 || self.port.whole());
        self.watch.end(whole);
        received
    }

    fn whole(&self) -> bool {
        self.port.whole()
    }

    fn drained(&mut self) -> Result<bool, Error> {
        self.port.drained()
    }

    fn arm(&mut self, rx: bool, tx: bool) -> bool {
        self.port.arm(rx, tx)
    }

    fn disarm(&mut self) {
        self.port.disarm();
    }

    fn notices(&self) -> [Notices; 2] {
        self.port.notices()
    }
}
