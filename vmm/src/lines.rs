//! Lines of what the guest writes on its control channel, for whoever listens to it beside the socket's reader.

/// The longest line that is looked at.
pub(crate) const LINE_LIMIT: usize = 4096;

/// The line so far.
#[derive(Default)]
pub(crate) struct Lines {
    line: Vec<u8>,
    overlong: bool,
}

impl Lines {
    /// Hands each line that ends among what was written to `hear`, without its newline; of one that is too long, nothing.
    pub(crate) fn take(&mut self, bytes: &[u8], mut hear: impl FnMut(&[u8])) {
        for &byte in bytes {
            if byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                if !std::mem::replace(&mut self.overlong, false) {
                    hear(&line);
                }
            } else if self.line.len() == LINE_LIMIT {
                self.overlong = true;
            } else {
                self.line.push(byte);
            }
        }
    }

    /// How much waits for its newline.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.line.len()
    }
}
