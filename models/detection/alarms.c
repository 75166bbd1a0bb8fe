#include "alarms.h"

#include <math.h>

enum { MUTED = 1 << 20, MUTED_EVENTS = 64 }; /* as in `models.detection.alarms` */
enum { MANY_EVENTS = 1 << 20 };              /* at this count `since` restarts from 0 */

alarm_t load_alarm(const parts_t *at, const float *state) {
    alarm_t alarm = {.number = state[at->alarm]};
    if (at->alarm_since >= 0)
        alarm.since = state[at->alarm_since], alarm.excess = state[at->alarm_excess];
    if (at->alarm_nats >= 0) {
        alarm.events = state[at->alarm_events];
        alarm.peak = (float)fmin(state[at->alarm_nats], MAX_NATS);
        alarm.latest = state[at->alarm_nats + 1];
    }
    return alarm;
}

void store_alarm(const parts_t *at, float *state, alarm_t alarm) {
    state[at->alarm] = alarm.number;
    if (at->alarm_since >= 0)
        state[at->alarm_since] = alarm.since, state[at->alarm_excess] = alarm.excess;
    if (at->alarm_nats >= 0) {
        state[at->alarm_events] = alarm.events;
        state[at->alarm_nats] = alarm.peak, state[at->alarm_nats + 1] = alarm.latest;
    }
}

static int next_code(const rule_t *rule, double threshold, double per_event, double nats,
                     alarm_t *alarm) {
    double number = trunc(alarm->number);
    if (number < 0.0) {
        double usual_nats = rule->has_record ? fmin(threshold, rule->usual_nats)
                                             : threshold - rule->hysteresis_nats;
        /* a restored state may have any number */
        double usual = nats < usual_nats ? fmin(-1.0 - number, rule->hold_events - 1) + 1.0 : 0.0;
        alarm->number = usual < rule->hold_events ? (float)(-1.0 - usual) : 0.0f;
        return usual < rule->hold_events ? CONTINUING : CLOSED;
    }
    if (number > MUTED && number <= MUTED + MUTED_EVENTS) {
        alarm->number = number > MUTED + 1 ? (float)(number - 1.0) : 0.0f;
        return NONE;
    }
    double excess = fmax(alarm->excess - per_event * alarm->since, 0.0);
    if (nats < threshold + rule->backoff_nats * fmax(excess - 1.0, 0.0)) {
        alarm->number = 0.0f;
        return NONE;
    }
    alarm->number = (float)fmin(number + 1.0, rule->min_events);
    if (alarm->number < rule->min_events) return NONE;
    alarm->number = -1.0f;
    alarm->excess = (float)(excess + 1.0);
    alarm->since = 0.0f;
    return OPENED;
}

int follow_alarm(const rule_t *rule, double threshold, double per_event, double nats,
                 alarm_t *alarm) {
    alarm->since = fmaxf(alarm->since, 0.0f) + 1.0f;
    if (alarm->since >= MANY_EVENTS) {
        /* so that it stays exact; excess alarms fall by what as many events lower them */
        alarm->since -= MANY_EVENTS;
        alarm->excess = (float)fmax(alarm->excess - per_event * MANY_EVENTS, 0.0);
    }
    int code = next_code(rule, threshold, per_event, nats, alarm);
    if (code == NONE || !rule->has_record) return code;
    double before = fmax(trunc(alarm->events), 0.0);
    alarm->events = code == OPENED ? 0.0f : (float)fmin(before + 1.0, MAX_COUNT);
    alarm->latest = (float)nats;
    alarm->peak = code == OPENED ? alarm->latest : fmaxf(alarm->peak, alarm->latest);
    return code;
}

void follow_alarms(const rule_t *rule, double threshold, double per_event, int64_t events,
                   const double *nats, alarm_t *alarm, int64_t *codes) {
    for (int64_t t = 0; t < events; t++)
        codes[t] = follow_alarm(rule, threshold, per_event, nats[t], alarm);
}

void write_outputs(const columns_t *columns, const float *network, double nats, int code,
                   double threshold, const alarm_t *alarm, float *outputs) {
    for (int i = 0; i < columns->size; i++)
        if (columns->source[i] >= 0) outputs[i] = network[columns->source[i]];
    outputs[columns->probability] = (float)exp(-nats);
    outputs[columns->alarm] = (float)code;
    if (code == NONE) return;
    if (columns->severity >= 0) outputs[columns->severity] = (float)(alarm->peak / threshold);
    if (columns->since >= 0) outputs[columns->since] = alarm->events;
}
