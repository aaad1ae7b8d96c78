"""What the originals' own tests and documents expect of their formulas.

Numbers only, each with the name of the case it is from, so that it can be looked up:

- kubernetes/kubernetes, pkg/controller/podautoscaler, replica_calculator_test.go
  (`RATIOS`) and horizontal_test.go (`RATES`, `WINDOWS`, `BOUNDS`)
- kubernetes/website, docs/tasks/run-application/horizontal-pod-autoscale ("docs: ...")
- knative/serving, pkg/autoscaler/scaling/autoscaler_test.go (`KPA`)
- kedacore/keda-docs 2.21, concepts/scaling-deployments and reference (`QUEUES`)
"""

# case, metric, target, readings of ready pods, silent pods, unready pods, expected
RATIOS = [
    ("ScaleUp", "cpu", 0.3, [0.3, 0.5, 0.7], 0, 0, 5),
    ("ScaleUpUnreadyLessScale", "cpu", 0.3, [0.5, 0.7], 0, 1, 4),
    ("ScaleUpHotCpuLessScale", "cpu", 0.3, [0.5, 0.7], 0, 1, 4),
    ("ScaleUpUnreadyNoScale", "cpu", 0.3, [0.4], 0, 2, 3),
    ("ScaleHotCpuNoScale", "cpu", 0.3, [0.4], 0, 2, 3),
    ("ScaleUpIgnoresFailedPods", "cpu", 0.3, [0.5, 0.7], 0, 0, 4),
    ("ScaleUpCM", "qps", 15, [20, 10, 30], 0, 0, 4),
    ("ScaleUpCMUnreadyHotCpuNoLessScale", "qps", 15, [50, 10, 30], 0, 0, 6),
    ("ScaleUpCMUnreadyHotCpuScaleWouldScaleDown", "qps", 15, [50, 15, 30], 0, 0, 7),
    ("ScaleUpCMObject", "qps", 15, [20, 20, 20], 0, 0, 4),
    ("ScaleUpCMPerPodObject", "qps", 5, [20 / 3] * 3, 0, 0, 4),
    ("ScaleUpCMObjectIgnoresUnreadyPods", "qps", 10, [50], 0, 2, 5),
    ("ScaleUpCMExternal", "qps", 4.4, [8.6], 0, 0, 2),
    ("ScaleUpPerPodCMExternal", "qps", 2.15, [8.6 / 3] * 3, 0, 0, 4),
    ("ScaleDown", "cpu", 0.5, [0.1, 0.3, 0.5, 0.25, 0.25], 0, 0, 3),
    ("ScaleDownCM", "qps", 20, [12] * 5, 0, 0, 3),
    ("ScaleDownPerPodCMObject", "qps", 2, [1.2] * 5, 0, 0, 3),
    ("ScaleDownCMExternal", "qps", 14.334, [8.6] * 5, 0, 0, 3),
    ("ScaleDownPerPodCMExternal", "qps", 2.867, [8.6 / 5] * 5, 0, 0, 3),
    ("ScaleDownIncludeUnreadyPods", "cpu", 0.5, [0.1, 0.3, 0.5], 0, 2, 2),
    ("ScaleDownExcludeUnscheduledPods", "cpu", 0.5, [0.1], 0, 4, 1),
    ("ScaleDownIgnoreHotCpuPods", "cpu", 0.5, [0.1, 0.3, 0.5], 0, 2, 2),
    ("Tolerance", "cpu", 1.0, [1.02] * 3, 0, 0, 3),
    ("ToleranceCM", "qps", 20, [20, 21, 21], 0, 0, 3),
    ("ToleranceCMObject", "qps", 20, [20.666] * 3, 0, 0, 3),
    ("TolerancePerPodCMObject", "qps", 5, [20.166 / 4] * 4, 0, 0, 4),
    ("ToleranceCMExternal", "qps", 8.888, [8.6] * 3, 0, 0, 3),
    ("TolerancePerPodCMExternal", "qps", 2.9, [8.6 / 3] * 3, 0, 0, 3),
    ("SuperfluousMetrics", "cpu", 1.0, [5.875] * 4, 0, 0, 24),
    ("MissingMetrics", "cpu", 1.0, [0.4, 0.095], 2, 0, 3),
    ("EmptyMetrics", "cpu", 1.0, [], 4, 0, 4),
    ("MissingMetricsNoChangeEq", "cpu", 1.0, [1.0], 1, 0, 2),
    ("MissingMetricsNoChangeGt", "cpu", 1.0, [1.9], 1, 0, 2),
    ("MissingMetricsNoChangeLt", "cpu", 1.0, [0.6], 1, 0, 2),
    ("MissingMetricsUnreadyChange", "cpu", 0.5, [0.45], 1, 1, 3),
    ("MissingMetricsUnreadyScaleUp", "cpu", 0.5, [2.0], 1, 1, 4),
    ("MissingMetricsUnreadyScaleDown", "cpu", 0.5, [0.1, 0.1], 1, 1, 3),
    ("ComputedToleranceAlgImplementation", "cpu", 0.56, [0.5] * 10, 0, 0, 9),
    ("docs: 200m of 100m doubles", "qps", 100, [200, 200], 0, 0, 4),
    ("docs: 50m of 100m halves", "qps", 100, [50, 50], 0, 0, 1),
]

# case, "up" or "down", (pods, period, percent, period), changes 30 s ago, replicas,
# wanted, minimum, maximum, expected
RATES = [
    ("pods larger than percent", "up", (100, 60, 100, 60), [], 10, 500, 1, 1000, 110),
    ("percent larger than pods", "up", (2, 60, 100, 60), [], 10, 500, 1, 1000, 20),
    ("large pod policy", "up", (100, 60, 0, 0), [], 10, 50, 1, 1000, 50),
    ("pod policy", "up", (30, 60, 0, 0), [], 10, 50, 1, 1000, 40),
    ("percent policy", "up", (0, 0, 200, 60), [], 10, 50, 1, 1000, 30),
    ("many recent events", "up", (5, 120, 0, 0), [1, 5, 9], 100, 500, 1, 1000, 100),
    ("pods and events", "up", (150, 120, 0, 0), [1, 5, 9], 100, 500, 1, 1000, 235),
    ("percent and events", "up", (0, 0, 200, 120), [1, 5, 9], 100, 500, 1, 1000, 255),
    ("up and down before", "up", (0, 0, 300, 300), [4, -2], 6, 24, 1, 1000, 16),
    ("UpscaleCap", "up", (0, 0, 700, 60), [], 3, 60, 1, 100, 24),
    ("UpscaleCap, max", "up", (0, 0, 700, 60), [], 3, 60, 1, 20, 20),
    ("max and events", "up", (300, 120, 0, 0), [1, 5, 9], 100, 500, 1, 200, 200),
    ("pods larger than percent", "down", (20, 60, 1, 60), [], 100, 2, 1, 1000, 80),
    ("percent larger than pods", "down", (2, 60, 1, 60), [], 100, 2, 1, 1000, 98),
    ("large pod policy", "down", (100, 60, 0, 0), [], 10, 0, 1, 1000, 1),
    ("large percent policy", "down", (0, 0, 100, 60), [], 10, 2, 5, 1000, 5),
    ("pod policy", "down", (5, 60, 0, 0), [], 10, 2, 1, 1000, 5),
    ("percent policy", "down", (0, 0, 50, 60), [], 10, 5, 1, 1000, 5),
    ("large, events", "down", (115, 120, 0, 0), [-1, -5, -9], 100, 0, 1, 1000, 1),
    ("min, events", "down", (130, 120, 0, 0), [-1, -5, -9], 100, 0, 5, 1000, 5),
    ("all, events", "down", (0, 0, 100, 120), [-1, -5, -9], 100, 2, 5, 1000, 5),
    ("pods, events", "down", (5, 120, 0, 0), [-1, -5, -9], 100, 2, 1, 1000, 100),
    ("percent, events", "down", (0, 0, 50, 120), [-2, -4, -6], 100, 0, 1, 1000, 56),
    ("up and down before", "down", (0, 0, 50, 180), [2, -4], 10, 1, 1, 1000, 6),
    ("prevented", "down", (0, 0, 10, 120), [-10, -10, -10], 100, 0, 1, 1000, 100),
    ("allowed", "down", (0, 0, 1000, 120), [-10, -10, -10], 10, 5, 1, 1000, 5),
]

# case, up window, down window, (age in s, recommendation), replicas, wanted, expected
WINDOWS = [
    ("empty", 0, 0, [], 100, 5, 5),
    ("simple down", 0, 180, [(120, 4), (60, 5)], 100, 3, 5),
    ("simple up", 300, 0, [(120, 4), (60, 5)], 1, 7, 4),
    ("no down", 300, 0, [(120, 1), (60, 2)], 100, 3, 3),
    ("no up", 0, 300, [(120, 4), (60, 5)], 1, 3, 3),
    ("old ones, down", 0, 0, [(600, 10), (540, 9)], 100, 3, 3),
    ("old ones, up", 0, 0, [(600, 10), (540, 9)], 1, 100, 100),
    ("one too old, down", 0, 180, [(600, 10), (540, 9), (120, 5), (60, 4)], 100, 3, 5),
    ("one too old, up", 300, 0, [(6000, 10), (180, 9), (120, 5), (60, 6)], 1, 100, 5),
    ("both, not up when it goes down", 300, 300, [(6000, 2), (180, 3)], 2, 1, 2),
    ("both, not down when it goes up", 300, 300, [(6000, 2), (180, 1)], 2, 3, 2),
]

# case, minimum, maximum, replicas, mean reading of a target of 1, expected
BOUNDS = [
    ("TooFewReplicas", 3, 5, 2, None, 3),
    ("TooManyReplicas", 3, 5, 10, None, 5),
    ("MaxReplicas", 2, 5, 3, 6.9, 5),
    ("SuperfluousMetrics", 2, 6, 4, 5.875, 6),
    ("EmptyMetrics", 2, 6, 4, None, 4),
]

# case, settings, (time, ready, stable, panic, expected) one after the other. Unless
# said otherwise the originals' tests allow ten times up and ten times down.
KPA = [
    (
        "StableModeIncreaseWithConcurrencyDefault",
        {"target": 10},
        [(0, 1, 50, 10, 5), (0, 1, 100, 10, 10)],
    ),
    (
        "StableModeIncreaseWithRPS",
        {"target": 10},
        [(0, 1, 50, 50, 5), (0, 1, 100, 99, 10)],
    ),
    (
        "UnpanicAfterSlowIncrease",
        {"target": 1},
        [(0, 10, 11, 25, 25), (30, 40, 30, 41, 41), (62, 55, 50, 56, 50)],
    ),
    (
        "ExtendPanicWindow",
        {"target": 1},
        [(0, 10, 11, 25, 25), (30, 40, 30, 80, 80)],
    ),
    (
        "StableModeDecrease",
        {"target": 10},
        [(0, 8, 100, 100, 10), (0, 8, 50, 50, 5)],
    ),
    (
        "StableModeNoTrafficScaleToZero",
        {"target": 10},
        [(0, 1, 1, 0, 1), (0, 1, 0, 0, 0)],
    ),
    (
        "PanicModeExponentialTrackAndStabilize",
        {"target": 1},
        [
            (0, 1, 6, 6, 6),
            (0, 6, 36, 36, 36),
            (1, 36, 216, 216, 216),
            (1, 216, 1296, 1296, 1296),
            (2, 1296, 1296, 1296, 1296),
        ],
    ),
    ("NoDataAtZeroNoAutoscale", {"target": 10}, [(0, 1, 0, 0, 0)]),
    ("StableModeUnlimitedTBC", {"target": 181}, [(0, 1, 21, 26, 1)]),
    ("0TBC", {"target": 10}, [(0, 1, 50, 49, 5)]),
    ("StableModeNoChange", {"target": 10}, [(0, 1, 50, 50, 5)]),
    ("StableModeNoChangeAlreadyScaled", {"target": 10}, [(0, 5, 50, 50, 5)]),
    (
        "PanicStableLargerThanPanic",  # panics from 5 replicas on, 5 s before
        {"target": 1},
        [(0, 2, 5, 5, 5), (5, 5, 50, 30, 50)],
    ),
    (
        "PanicStableLessThanPanic",
        {"target": 1},
        [(0, 2, 5, 5, 5), (5, 5, 20, 30, 30)],
    ),
    (
        "StableModeIncreaseWithSmallScaleUpRate",
        {"target": 1, "max_up": 1.1},
        [(0, 2, 3, 3.1, 3)],
    ),
    (
        "StableModeDecreaseWithSmallScaleDownRate",
        {"target": 10, "max_down": 1.1},
        [(0, 100, 1, 1, 90)],
    ),
    ("PanicModeDoublePodCount", {"target": 10}, [(0, 1, 50, 100, 10)]),
    (
        "PanicThenUnPanicScaleDown",
        {"target": 10},
        [
            (0, 1, 100, 100, 10),
            (0, 10, 100, 1000, 100),
            (30, 10, 1, 1, 100),
            (61, 10, 1, 1, 1),
        ],
    ),
    (
        "RateLimitScaleUp",
        {"target": 10},
        [(0, 1, 1000, 1001, 10), (0, 10, 1000, 1001, 100)],
    ),
    (
        "RateLimitScaleDown",
        {"target": 10},
        [(0, 100, 1, 1, 10), (0, 10, 1, 1, 1)],
    ),
    (
        "UseOnePodAsMinimumIfEndpointsNotFound",
        {"target": 10},
        [(0, 0, 1000, 888, 10)],
    ),
    ("UpdateTarget, before", {"target": 10}, [(0, 1, 100, 101, 10)]),
    ("UpdateTarget, after", {"target": 1}, [(0, 10, 100, 101, 100)]),
    (
        "ScaleDownDelay, simple",
        {"target": 10, "delay_s": 300, "panic_at": 100},
        [(2, 0, 40, 40, 4), (300, 0, 0, 0, 4), (302, 0, 0, 0, 0)],
    ),
    (
        "ScaleDownDelay, gradual",
        {"target": 10, "delay_s": 300, "panic_at": 100},
        [
            (540, 0, 40, 40, 4),
            (600, 0, 30, 30, 4),
            (660, 0, 0, 0, 4),
            (840, 0, 0, 0, 3),
            (900, 0, 0, 0, 0),
        ],
    ),
    (
        "ScaleDownDelayZero",
        {"target": 10, "panic_at": 100},
        [(0, 0, 40, 40, 4), (0.5, 0, 20, 20, 2)],
    ),
]

# case, settings, (time, replicas, jobs waiting, expected) one after the other
QUEUES = [
    ("nothing pending: stays at zero", {}, [(0, 0, 0, 0), (30, 0, 0, 0)]),
    ("one message activates", {}, [(0, 0, 1, 1)]),
    (
        "threshold 10, activation 50, 40 messages: to zero although HPA wants 4",
        {"per_replica": 10, "activation": 50, "cooldown_s": 300},
        [(0, 4, 51, 6), (15, 6, 40, 6), (300, 6, 40, 0)],
    ),
    ("more than the activation, not as many", {"activation": 3}, [(0, 0, 3, 0)]),
    ("more than the activation", {"activation": 3}, [(0, 0, 4, 1)]),
    ("from one to many as HPA does", {}, [(0, 1, 20, 4)]),
    (
        "cooldown 300 s after the queue was last seen filled",
        {},
        [(0, 1, 2, 1), (30, 1, 0, 1), (299, 1, 0, 1), (300, 1, 0, 0)],
    ),
    (
        "cooldown counts to zero only: more than one go as HPA says",
        {"cooldown_s": 3600},
        [(0, 4, 20, 4), (15, 4, 1, 4), (316, 4, 1, 1), (331, 1, 0, 1)],
    ),
    ("a minimum is kept", {"minimum": 2}, [(0, 0, 0, 2), (900, 2, 0, 2)]),
    ("an active queue wakes the minimum", {"minimum": 3}, [(0, 0, 1, 3)]),
]
