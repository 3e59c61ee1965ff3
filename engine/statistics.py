"""Running statistics of the updates, summed on the device so that the host never waits for them."""

import torch
from torch import Tensor


class UpdateStatistics:
    """Sums over updates, on the device until they are read.

    Of the epoch, over its finite updates: the sums of loss and gradient norm, and their number. Of
    the last update: loss and norm. Of the run: skipped updates; how many of them are the last ones
    in a row (streak), and of these how many had a non-finite loss on this process.
    """

    FIELDS = ("loss_sum", "norm_sum", "loss", "norm", "finite", "skipped", "streak", "bad_losses")
    OF_EPOCH = 5  # the first fields, which start at 0 in every epoch

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.values = torch.zeros(len(self.FIELDS), dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, norm: Tensor, finite: Tensor) -> None:
        """Counts one update: scalars on the device, `finite` a boolean."""
        loss = loss.to(self.values)
        norm = norm.to(self.values)
        taken = finite.to(self.values)
        skipped = 1 - taken
        bad_loss = (~torch.isfinite(loss)).to(self.values)
        loss_sum, norm_sum, _, _, count, skips, streak, bad_losses = self.values.unbind()
        self.values = torch.stack(
            [
                loss_sum + torch.where(finite, loss, 0),
                norm_sum + torch.where(finite, norm, 0),
                loss,
                norm,
                count + taken,
                skips + skipped,
                (streak + 1) * skipped,
                (bad_losses + bad_loss) * skipped,
            ]
        )

    def start_epoch(self) -> None:
        """Resets the sums of the epoch."""
        self.values[: self.OF_EPOCH] = 0

    def read(self) -> dict[str, float]:
        """The fields by name, plus loss_mean and norm_mean. Waits for the device."""
        read = dict(zip(self.FIELDS, self.values.tolist(), strict=True))
        count = max(read["finite"], 1)
        return read | {"loss_mean": read["loss_sum"] / count, "norm_mean": read["norm_sum"] / count}
