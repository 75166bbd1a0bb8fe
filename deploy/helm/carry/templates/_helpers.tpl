{{/*
Name of the objects, short enough for labels with the name of a consumer. A release that a service cannot be called by
has the start of its hash instead of the rest.
*/}}
{{- define "carry.fullname" -}}
{{- $name := contains "carry" .Release.Name | ternary .Release.Name (printf "%s-carry" .Release.Name) }}
{{- if not (regexMatch "^[a-z][-a-z0-9]{0,29}$" $name) }}
  {{- $start := regexReplaceAll "^([0-9])" (replace "." "-" $name) "carry-$1" | trunc 21 | trimSuffix "-" }}
  {{- $name = printf "%s-%s" $start (sha256sum .Release.Name | trunc 8) }}
{{- end }}
{{- .Values.fullnameOverride | default $name }}
{{- end }}

{{- define "carry.image" -}}
{{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) | toJson }}
{{- end }}

{{/* Labels that select pods, of (dict "root" $ "app" NAME "component" NAME), in JSON. */}}
{{- define "carry.selector" -}}
{{- $labels := dict "app.kubernetes.io/name" .app "app.kubernetes.io/instance" .root.Release.Name }}
{{- with .component }}{{ $_ := set $labels "app.kubernetes.io/component" . }}{{ end }}
{{- toJson $labels }}
{{- end }}

{{/* Metadata of an object, in JSON; the context may also have `name`, `suffix`, `labels` and `annotations`. */}}
{{- define "carry.metadata" -}}
{{- $labels := dict "app.kubernetes.io/version" .root.Chart.AppVersion }}
{{- $_ := set $labels "app.kubernetes.io/managed-by" .root.Release.Service }}
{{- $_ := set $labels "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version) }}
{{- $labels = merge $labels (include "carry.selector" . | fromJson) (.labels | default dict) }}
{{- $metadata := dict "name" (printf "%s%s" .name (.suffix | default "")) "labels" $labels }}
{{- with .annotations }}{{ $_ := set $metadata "annotations" . }}{{ end }}
{{- toJson $metadata }}
{{- end }}

{{/* Fields of a pod that are values. */}}
{{- define "carry.podFields" -}}
imagePullSecrets: {{ toJson .Values.imagePullSecrets }}
{{- range $name, $value := omit .Values.pod "labels" "annotations" "env" "volumes" "volumeMounts" }}
{{- with $value }}
{{ $name }}: {{ toJson . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "carry.containerSecurity" -}}
{allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
{{- end }}

{{/* Scales the deployment `name` by `autoscaling`; `trigger` is what KEDA reads from Prometheus. */}}
{{- define "carry.scaler" -}}
{{- with .autoscaling }}
{{- if and (ne .kind "none") (gt (int .minReplicas) (int .maxReplicas)) }}
  {{- fail (printf "%s: expected autoscaling.minReplicas of at most %v (maxReplicas), got %v" $.name .maxReplicas .minReplicas) }}
{{- end }}
{{- end }}
{{- if eq .autoscaling.kind "hpa" }}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {{ include "carry.metadata" . }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ .name }}}
  minReplicas: {{ .autoscaling.minReplicas }}
  maxReplicas: {{ .autoscaling.maxReplicas }}
  metrics:
    - type: Resource
      resource: {name: cpu, target: {type: Utilization, averageUtilization: {{ .autoscaling.cpu }}}}
  behavior:
    scaleDown: {stabilizationWindowSeconds: 300}
{{- else if eq .autoscaling.kind "keda" }}
---
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata: {{ include "carry.metadata" . }}
spec:
  scaleTargetRef: {name: {{ .name }}}
  minReplicaCount: {{ .autoscaling.minReplicas }}
  maxReplicaCount: {{ .autoscaling.maxReplicas }}
  triggers:
    - type: prometheus
      metricType: {{ .trigger.metricType }}
      metadata:
        serverAddress: {{ toJson .root.Values.monitoring.prometheus }}
        query: {{ .trigger.query | quote }}
        threshold: {{ .trigger.threshold | quote }}
        # without metrics the number of pods stays the same
        ignoreNullValues: "false"
    - type: cpu
      metricType: Utilization
      metadata: {value: {{ .autoscaling.cpu | quote }}}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        # slowly: a short wait does not say how many pods are too many, and a consumer that leaves moves topics
        scaleDown:
          stabilizationWindowSeconds: 300
          policies: [{type: Pods, value: 1, periodSeconds: 60}]
{{- end }}
{{- end }}
