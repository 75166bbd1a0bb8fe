{{/*
The objects of a group of pods: settings, deployment, disruption budget, network policy and scaler. Context:
  root, name, app, component  $, the name of the objects, and labels of the pods
  container, args, ports, startupPath     of the container; probes use the first port
  ownSettings, settings, store, config    CARRY_ variables, the store, and the configuration of a consumer
  clients, egress                         rules of the network policy
  replicas, autoscaling, trigger, resources
*/}}
{{- define "carry.workload" -}}
{{- $root := .root }}
{{- $values := .root.Values }}
{{- $selector := include "carry.selector" . }}
{{- $settings := merge (dict "CARRY_ADMIN_PORT" 8001) .ownSettings }}
{{- $env := $values.pod.env }}
{{- $mounts := concat (list (dict "name" "scratch" "mountPath" "/tmp") (dict "name" "scratch" "mountPath" "/data")) $values.pod.volumeMounts }}
{{- $volumes := $values.pod.volumes }}

{{- /* the store */}}
{{- $store := .store }}
{{- if $values.store.bundled.enabled }}
  {{- $url := printf "redis://%s-store:6379/0" (include "carry.fullname" $root) }}
  {{- $store = merge (dict "url" $url "urlKey" "") $values.store }}
{{- end }}
{{- if not (or $store.url $store.urlKey) }}
  {{- if $values.store.urlKey }}{{ fail "consumerDefaults.store.url: expected an address, or urlKey, since the service's is in a secret" }}{{ end }}
  {{- $url := regexReplaceAll "://([^@/]*@)?" $values.store.url "://consumer@" }}
  {{- $store = mergeOverwrite (deepCopy $store) (dict "url" $url) }}
{{- end }}
{{- if regexMatch "://[^@/]*:[^@/]*@" $store.url }}
  {{- fail "store.url: expected no password, which a ConfigMap would show: keep it in the secret store.secret as store.passwordKey, or the whole address as store.urlKey" }}
{{- end }}
{{- with $store.secret }}
  {{- $volumes = append $volumes (dict "name" "secrets" "secret" (dict "secretName" . "defaultMode" 288)) }}
  {{- $mounts = append $mounts (dict "name" "secrets" "mountPath" "/secrets" "readOnly" true) }}
{{- end }}
{{- if $store.urlKey }}
  {{- $name := required "store.urlKey: expected also store.secret, the name of the secret with this key" $store.secret }}
  {{- $from := dict "secretKeyRef" (dict "name" $name "key" $store.urlKey) }}
  {{- $env = append $env (dict "name" "CARRY_REDIS_URL" "valueFrom" $from) }}
{{- else }}
  {{- $_ := set $settings "CARRY_REDIS_URL" $store.url }}
  {{- if and $store.secret $store.passwordKey }}
    {{- $_ := set $settings "CARRY_REDIS_PASSWORD_FILE" (printf "/secrets/%s" $store.passwordKey) }}
  {{- end }}
{{- end }}

{{- /* models */}}
{{- with $values.models }}
  {{- $source := dict }}
  {{- if .claim }}{{ $_ := set $source "persistentVolumeClaim" (dict "claimName" .claim "readOnly" true) }}{{ end }}
  {{- if .image }}{{ $_ := set $source "image" (dict "reference" .image "pullPolicy" $values.image.pullPolicy) }}{{ end }}
  {{- if .pull }}{{ $_ := set $source "emptyDir" dict }}{{ end }}
  {{- if gt (len $source) 1 }}{{ fail "models: expected one of models.claim, models.image and models.pull" }}{{ end }}
  {{- if $source }}
    {{- $_ := set $settings "CARRY_MODELS_DIR" (empty .pull | ternary "/models" "/models/artifacts") }}
    {{- $volumes = append $volumes (merge (dict "name" "models") $source) }}
    {{- $mounts = append $mounts (dict "name" "models" "mountPath" "/models" "readOnly" true) }}
  {{- end }}
{{- end }}

{{- /* settings */}}
{{- $owners := dict "CARRY_REDIS_URL" "store.url" "CARRY_REDIS_PASSWORD_FILE" "store.passwordKey" "CARRY_GRPC_PORT" "grpc" }}
{{- $owners = merge $owners (dict "CARRY_PORT" "the Service" "CARRY_ADMIN_PORT" "the Service") }}
{{- range $name, $value := .settings }}
  {{- with get $owners $name }}{{ fail (printf "settings.%s: the chart sets it, by %s" $name .) }}{{ end }}
  {{- $_ := set $settings $name $value }}
{{- end }}
{{- $graceS := 15.0 }}
{{- range $name, $default := dict "CARRY_LAME_DUCK_S" 0 "CARRY_DRAIN_S" 30 }}
  {{- $value := get $settings $name | toString }}
  {{- $graceS = eq $value "" | ternary $default $value | float64 | addf $graceS }}
{{- end }}
apiVersion: v1
kind: ConfigMap
metadata: {{ include "carry.metadata" (merge (dict "suffix" "-settings") .) }}
data:
  {{- range $name, $value := $settings }}
  {{- /* toJson, since Helm prints large whole numbers as floats */}}
  {{ $name }}: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}
  {{- end }}
{{- with .config }}
  {{- $volumes = append $volumes (dict "name" "config" "configMap" (dict "name" $.name)) }}
  {{- $mounts = append $mounts (dict "name" "config" "mountPath" "/config" "readOnly" true) }}
---
apiVersion: v1
kind: ConfigMap
metadata: {{ include "carry.metadata" $ }}
data:
  consumer.yaml: |
    {{- toYaml . | nindent 4 }}
{{- end }}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{ include "carry.metadata" . }}
spec:
  {{- if eq .autoscaling.kind "none" }}
  replicas: {{ .replicas }}
  {{- end }}
  selector: {matchLabels: {{ $selector }}}
  strategy:
    # each consumer that joins or leaves moves topics: one at a time
    rollingUpdate: {maxSurge: 1, maxUnavailable: 0}
  template:
    metadata:
      labels: {{ merge (fromJson $selector) $values.pod.labels | toJson }}
      # a change of the settings replaces the pods
      {{- $checksum := dict "checksum/settings" (list $settings .config | toJson | sha256sum) }}
      annotations: {{ merge $checksum $values.pod.annotations | toJson }}
    spec:
      automountServiceAccountToken: false
      # variables such as CARRY_PORT=tcp://... are no settings
      enableServiceLinks: false
      # longer than the shutdown: lame duck, drain and seven seconds
      terminationGracePeriodSeconds: {{ ceil $graceS | int }}
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector: {matchLabels: {{ $selector }}}
      {{- include "carry.podFields" $root | nindent 6 }}
      {{- with $values.models.pull }}
      initContainers:
        {{- range $name, $uri := . }}
        - name: pull-{{ $name }}
          image: {{ empty $values.models.pullImage | ternary (include "carry.image" $root) (toJson $values.models.pullImage) }}
          imagePullPolicy: {{ $values.image.pullPolicy }}
          args: [models, pull, {{ $uri | quote }}, "/models/artifacts/{{ $name }}", --overwrite]
          {{- $folders := list (dict "name" "HOME" "value" "/models") (dict "name" "TMPDIR" "value" "/models") }}
          env: {{ concat $folders $values.pod.env | toJson }}
          securityContext: {{ include "carry.containerSecurity" . }}
          volumeMounts: {{ append $values.pod.volumeMounts (dict "name" "models" "mountPath" "/models") | toJson }}
        {{- end }}
      {{- end }}
      containers:
        - name: {{ .container }}
          image: {{ include "carry.image" $root }}
          imagePullPolicy: {{ $values.image.pullPolicy }}
          {{- with .args }}
          args: {{ toJson . }}
          {{- end }}
          envFrom:
            - configMapRef: {name: {{ .name }}-settings}
          {{- with $env }}
          env: {{ toJson . }}
          {{- end }}
          ports: {{ toJson .ports }}
          {{- $port := (first .ports).name }}
          startupProbe:
            httpGet: {path: {{ .startupPath }}, port: {{ $port }}}
            periodSeconds: 2
            # TensorFlow compiles the programs of a model for 10 to 20 s of CPU time
            failureThreshold: 90
          readinessProbe:
            httpGet: {path: /health/ready, port: {{ $port }}}
            periodSeconds: 5
            timeoutSeconds: 4
            failureThreshold: 2
          livenessProbe:
            httpGet: {path: /health/live, port: {{ $port }}}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          resources: {{ toJson .resources }}
          securityContext: {{ include "carry.containerSecurity" . }}
          volumeMounts: {{ toJson $mounts }}
      volumes:
        - name: scratch
          emptyDir: {medium: Memory, sizeLimit: 64Mi}
        {{- with $volumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
{{- if $values.podDisruptionBudget.enabled }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {{ include "carry.metadata" . }}
spec:
  selector: {matchLabels: {{ $selector }}}
  maxUnavailable: {{ $values.podDisruptionBudget.maxUnavailable }}
{{- end }}
{{- if $values.networkPolicy.enabled }}
{{- $monitoring := printf "{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %s}}}" (toJson $values.monitoring.namespace) }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{ include "carry.metadata" . }}
spec:
  podSelector: {matchLabels: {{ $selector }}}
  policyTypes: [Ingress, Egress]
  ingress:
    {{- range .clients }}
    - {{ toJson . }}
    {{- end }}
    # the admin port requires no key
    - from: [{{ $monitoring }}]
      ports: [{port: admin}]
  egress:
    {{- if $values.store.bundled.enabled }}
    - to: [{podSelector: {matchLabels: {{ include "carry.selector" (dict "root" $root "app" "carry-store") }}}}]
      ports: [{port: 6379}]
    {{- else }}
    - {{ toJson $values.networkPolicy.store }}
    {{- end }}
    # a collector of traces (OTLP over HTTP)
    - to: [{{ $monitoring }}]
      ports: [{port: 4318}]
    - to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}}]
      ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
    {{- range concat $values.networkPolicy.egress .egress }}
    - {{ toJson . }}
    {{- end }}
{{- end }}
{{- include "carry.scaler" . }}
{{- end }}
