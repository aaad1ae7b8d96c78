"""Careful steps: one replica more when it is tight, one less when it is not."""

FAILS = {"keeps_the_promise_on_known_shapes", "survives_the_loss_of_all"}


class Steps(Forecast):
    def desired(self, load):
        wanted = super().desired(load)
        there = max(self.service.minimum, min(load.replicas, self.service.maximum))
        if load.starting:  # the last step has not shown its effect yet
            return there
        return there + (wanted > there) - (wanted < there)


def autoscaler(service):
    return Steps(service)
