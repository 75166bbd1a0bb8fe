/* Alarms of one stream, event after event: see `models.detection.alarms` for the rules. */

#ifndef CARRY_ALARMS_H
#define CARRY_ALARMS_H

#include "state.h"

enum { NONE, OPENED, CONTINUING, CLOSED };
enum { MAX_NATS = 60 };       /* as in `models.detection.tails` */
enum { MAX_COUNT = 1 << 24 }; /* floats have every whole number up to it */

/* `models.detection.alarms.Rule` has the same fields; nats are -log of tail probabilities. */
typedef struct {
    int32_t min_events, hold_events;
    int32_t has_record;     /* whether alarms close at `usual_nats`, and are recorded */
    double usual_nats;      /* fewer are usual again */
    double hysteresis_nats; /* without a record: so many below the threshold are usual again */
    double backoff_nats;    /* each excess alarm but the first raises the threshold by it */
} rule_t;

/* A stream's alarm as its state has it, with the fields of `models.detection.alarms.AlarmState`. */
typedef struct {
    float number;        /* unusual events in a row; -1 - usual ones if open; MUTED + muted ones */
    float since, excess; /* events since the latest alarm, excess alarms right after it */
    float events, peak;  /* since an alarm opened, and the most nats of them */
    float latest;        /* nats of its last event */
} alarm_t;

/* Columns of the outputs of an event: the network's but the forecast, and those of detection.
   `models.detection.alarms.Columns` has the same fields. */
typedef struct {
    int32_t size;                                /* their number */
    int32_t probability, alarm, severity, since; /* -1 of those that the model lacks */
    const int32_t *source; /* [size], columns of the network's outputs, -1 of detection's */
    double thresholds[2];  /* threshold and `per_event` of streams without a rate of their own */
} columns_t;

/* Reads an alarm from a state, and writes it there. */
alarm_t load_alarm(const parts_t *at, const float *state);
void store_alarm(const parts_t *at, float *state, alarm_t alarm);

/* The alarm at an event: NONE to CLOSED.

   threshold: nats from which an event is unusual enough.
   per_event: the specified alarms per event. */
int follow_alarm(const rule_t *rule, double threshold, double per_event, double nats,
                 alarm_t *alarm);

/* Writes the alarm at each of `events` events to `codes`. */
void follow_alarms(const rule_t *rule, double threshold, double per_event, int64_t events,
                   const double *nats, alarm_t *alarm, int64_t *codes);

/* Writes the outputs [size] of an event: those of the network, its probability and its alarm. */
void write_outputs(const columns_t *columns, const float *network, double nats, int code,
                   double threshold, const alarm_t *alarm, float *outputs);

#endif
