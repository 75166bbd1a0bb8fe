/* The state of detection of one stream. */

#ifndef CARRY_STATE_H
#define CARRY_STATE_H

#include <stdint.h>

/* Offset of each part of a stream's state (`detection_parts` of `models.spec.detection`), -1 of
   those that the model lacks. `distance`, `spread` and `peak` are the weighted sum of |e|, the root
   of that of min(|e|, LIMIT d)^2, and the fourth root of that of the fourth powers, since floats
   have none of small values. `mean` + `rest` is the mean, with the digits of an offset. */
typedef struct {
    int32_t events, weight, last, mean, rest, distance, spread, peak, average, run, longest, season,
        season_weight, season_gain, tail_counts, tail_pending, tail_filled, alarm, alarm_since,
        alarm_excess, alarm_events, alarm_nats;
} parts_t;

#endif
